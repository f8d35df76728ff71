"""A fusion of weights with the values of its options that are best on held-out images."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from zoo.assembly.given import Members, Norms, parted, settled, wants_repair
from zoo.assembly.one_network import fuse_weights
from zoo.datasets import load_data
from zoo.errors import FusionError, OptionError
from zoo.fusion.planning import check_classes
from zoo.fusion.weighting import Weight
from zoo.model import Model
from zoo.options import checked, options_of
from zoo.progress import task
from zoo.search import Range, best, read_space
from zoo.specs import FusionSpec

Space: TypeAlias = Mapping[str, tuple[Any, ...] | Range]


@dataclass(frozen=True, slots=True)
class Found:
    """The better of the best fusion and the best member. options: all those of the best fusion.
    report: what its strategy reports. told: every candidate and member with its score, as JSON
    values."""

    model: Model
    options: dict[str, Any]
    report: dict[str, Any]
    told: dict[str, Any]


def read_search(
    spec: FusionSpec, space: Mapping[str, Any], options: Mapping[str, Any], *, has_data: bool
) -> Space:
    """What to try of which option. Raises OptionError for what cannot be tried and FusionError
    without data, before any work."""
    if spec.kind != "weights":
        raise OptionError(spec.name, "search belongs to fusions of weights; leave it out")
    if not has_data:
        raise FusionError(spec.name, "values are searched on held-out images, and none are given",
                          "Pass data=, labelled and kept apart from training and test")
    whole = [option.name for option in options_of(spec) if option.type.startswith("int")]
    wanted = read_space(spec.name, space, whole)
    for name, part in wanted.items():
        if name in options:
            raise OptionError(spec.name, f"the option {name!r} is given and searched; choose one")
        for value in (part.at(part.low), part.at(part.high)) if isinstance(part, Range) else part:
            checked(spec, {**options, name: value})
    return wanted


def search_weights(
    spec: FusionSpec, models: Sequence[Model], base: Model | None, weight: Weight | None,
    options: Mapping[str, Any], space: Space, *, seed: int, device: torch.device, data: Any,
    norms: Norms, alone: Sequence[Model],
) -> Found:
    """Fuse with one set of values after another, and compare with each member alone.

    Half of the data judges, by accuracy, and by NLL where that is the same. Strategies that learn,
    and new statistics of batch norm, see the other half; without any, all of the data judges. Batch
    norm is treated as `norms` says, in members too; so on the images that judge the result is no
    worse than the best member. alone: the members as they are, where those to fuse had to be
    brought to one image size.
    """
    check_classes(spec.name, [f"member {number}" for number in range(1, len(models) + 1)],
                  [model.classes for model in models])
    images = load_data(data, role="train", image_size=models[0].image_size)
    rest, held_out = parted(spec, models[0], images.with_classes(models[0].classes), norms,
                            repairing=wants_repair(spec, models, norms))

    def judged(
        model: Model, fused: Members | None = None
    ) -> tuple[tuple[float, float], dict[str, Any]]:
        score, done = settled(model, rest, held_out.with_classes(model.classes), norms, fused)
        member = next(model.each_member())
        member.norms = done or member.norms
        return score, {"accuracy": score[0], "nll": -score[1], "norms": member.norms}

    fusions: list[dict[str, Any]] = []
    top: list[tuple[tuple[float, float], Model, dict[str, Any]]] = []
    with task("search", unit="candidates") as advance:

        def evaluate(values: Mapping[str, Any]) -> tuple[float, float]:
            fused, report, members = fuse_weights(
                spec, models, base, weight, checked(spec, {**options, **values}), seed=seed,
                device=device, images=rest, norms=norms)
            score, facts = judged(fused, members)
            fusions.append({"options": dict(values), **facts})
            if not top or score > top[0][0]:
                top[:] = [(score, fused, report)]
            advance()
            return score

        chosen, _ = best(space, evaluate)
        singles: list[dict[str, Any]] = []
        score, model, report = top[0]
        won = "fusion"
        for number, single in enumerate(alone, 1):
            own = copy.deepcopy(single).to(device).eval()
            found, facts = judged(own)
            singles.append({"member": number, **facts})
            if found > score:
                score, model, won = found, own, f"member {number}"
            advance()
    values = checked(spec, {**options, **chosen.values})
    told = {"space": {name: str(part) if isinstance(part, Range) else list(part)
                      for name, part in space.items()},
            "fusions": fusions, "members": singles, "won": won, "images": len(held_out),
            "data": images.fingerprint()}
    return Found(model, values, report, told)
