"""What a run found, as the JSON values of `report.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import zoo
from zoo.evaluation import Evaluation
from zoo.measures import mcnemar
from zoo.pipeline.recipes import Recipe
from zoo.pipeline.steps import Step


def report_of(
    recipe: Recipe, steps: Mapping[str, Step], measured: Mapping[str, Evaluation],
    images: Mapping[str, int], seconds: float,
) -> dict[str, Any]:
    """The stages side by side, and paired tests between them.

    steps, measured: one per stage, in order. images: how many of them each part of the data has.
    A measure that is not finite becomes None: JSON has no such numbers.
    """
    stages = {
        name: {**measured[name].as_dict(), "model": step.model.name, "kept": step.kept,
               "train_seconds": step.seconds, "notes": list(step.notes),
               "history": list(step.history)}
        for name, step in steps.items()
    }
    pairs = [("fused", other) for other in steps if other != "fused"]
    if "updated" in steps:
        pairs.append(("updated", "target"))
    tests = [{"a": a, "b": b, **mcnemar(measured[a].correct, measured[b].correct)}
             for a, b in pairs]
    classes = list(next(iter(steps.values())).model.classes)
    report: dict[str, Any] = _finite({
        "stages": stages,
        "tests": tests,
        "data": {**images, "classes": classes},
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "seed": recipe.seed,
        "seconds": seconds,
        "zoo": zoo.__version__,
    })
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
