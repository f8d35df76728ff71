"""The curve of a search over one number, such as how far between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Curve:
    """Accuracy on validation by the values of one option; members: those that were fused, by
    name, with what each has alone."""

    option: str
    values: Sequence[float]
    accuracies: Sequence[float]
    members: Sequence[tuple[str, float]]
    images: int


def curve_of(recipe: Mapping[str, Any]) -> Curve | None:
    """The curve in a fused model's recipe, where one option alone was searched and it is a
    number."""
    told = recipe.get("search")
    tried = told.get("fusions") if isinstance(told, Mapping) else None
    options = {name for each in tried or () for name in each["options"]}
    if len(options) != 1:
        return None
    assert told is not None
    (option,) = options
    points = {each["options"][option]: each["accuracy"] for each in tried or ()}
    if len(points) < 2 or not all(type(value) in (int, float) for value in points):
        return None
    values = sorted(points)
    members = [(f"member {each['member']}", each["accuracy"]) for each in told["members"]]
    return Curve(option, values, [points[value] for value in values], members, told["images"])
