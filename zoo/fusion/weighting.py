"""Which weight each member has in each tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from zoo.errors import OptionError
from zoo.fusion.depth import depths

# One member's: a number, or numbers from the input to the output.
Share: TypeAlias = float | Sequence[float]
Weight: TypeAlias = (
    float | Sequence[Share | Mapping[str, Share]] | Mapping[str, float | Sequence[Share]]
)


def resolve_weights(
    weight: Weight | None, keys: Collection[str], members: int, owner: str
) -> dict[str, tuple[float, ...]]:
    """Each tensor's weights, one per member.

    weight: None (each 1); a number for all; one item per member, a number or `{pattern: number}`;
    or `{pattern: number or one per member}`. A pattern is shell-style (`blocks.[0-5].*`); the
    first that matches a key decides. In place of one member's number, a list runs along the depth
    of the network, `[0.9, 0.5, 0.1]` from its input to its output, straight between the points;
    so `[[1, 0], [0, 1]]` takes the input's side of the first member, the output's of the second.
    keys: the tensors' keys. owner: the strategy's name.

    Raises OptionError for the wrong count, for a value that is no finite number, for a pattern
    that decides no tensor and for a tensor that no pattern matches.
    """
    if isinstance(weight, Mapping):
        tables = {pattern: _row(value, members, owner) for pattern, value in weight.items()}
        rows: list[Any] = [{pattern: row[member] for pattern, row in tables.items()}
                           for member in range(members)]
    else:
        rows = _row(1.0 if weight is None else weight, members, owner)
    depth_of = depths(keys)
    columns = [_by_key(row, depth_of, owner) for row in rows]
    return {key: tuple(column[key] for column in columns) for key in keys}


def want_shares(strategy: str, weights: Mapping[str, Sequence[float]]) -> None:
    """Raises OptionError for weights that are no shares: all 0 or more, and one above."""
    for key, row in weights.items():
        if min(row) < 0 or max(row) == 0:
            raise OptionError(strategy, f"the weights {tuple(row)} of {key!r} are no shares, "
                              "expected 0 or more, and one of them above")


def _row(value: Any, members: int, owner: str) -> list[Any]:
    if isinstance(value, int | float):
        return [value] * members
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != members:
        raise OptionError(owner, f"weight is {value!r}, expected a number or {members} of them, "
                          "one per member")
    return list(value)


def _by_key(row: Any, depth_of: Mapping[str, float], owner: str) -> dict[str, float]:
    """One member's weight in each tensor."""
    if not isinstance(row, Mapping):
        points = _points(row, owner)
        return {key: _at(points, depth) for key, depth in depth_of.items()}
    lines = {pattern: _points(value, owner) for pattern, value in row.items()}
    found: dict[str, float] = {}
    idle = list(lines)
    for key, depth in depth_of.items():
        pattern = next((pattern for pattern in lines if fnmatchcase(key, pattern)), None)
        if pattern is None:
            raise OptionError(owner, f"no weight pattern matches the tensor {key!r}; "
                              "end with '*' for all others")
        found[key] = _at(lines[pattern], depth)
        if pattern in idle:
            idle.remove(pattern)
    if idle:
        raise OptionError(owner, f"the weight pattern {idle[0]!r} decides no tensor: none is "
                          "called so, or the patterns before it have them all")
    return found


def _points(value: Any, owner: str) -> list[float]:
    """The numbers from input to output, evenly spaced; a single one holds everywhere."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for number in values or [None]:
        if (isinstance(number, bool) or not isinstance(number, int | float)
                or not math.isfinite(number)):
            raise OptionError(owner, f"a weight is {number!r}, expected a finite number")
    return [float(number) for number in values]


def _at(points: Sequence[float], depth: float) -> float:
    place = depth * (len(points) - 1)
    before = min(int(place), max(len(points) - 2, 0))
    after = min(before + 1, len(points) - 1)
    return points[before] + (points[after] - points[before]) * (place - before)
