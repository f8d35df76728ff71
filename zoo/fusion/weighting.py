"""Which weight each member has in each tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from zoo.errors import OptionError

Weight: TypeAlias = (
    float | Sequence[float | Mapping[str, float]] | Mapping[str, float | Sequence[float]]
)


def resolve_weights(
    weight: Weight | None, keys: Collection[str], members: int, owner: str
) -> dict[str, tuple[float, ...]]:
    """Each tensor's weights, one per member.

    weight: None (each 1); a number for all; one item per member, a number or `{pattern: number}`;
    or `{pattern: number or one per member}`. A pattern is shell-style (`blocks.[0-5].*`); the
    first that matches a key decides. keys: the tensors' keys. owner: the strategy's name.

    Raises OptionError for the wrong count, for a value that is no finite number, for a pattern
    that decides no tensor and for a tensor that no pattern matches.
    """
    if isinstance(weight, Mapping):
        tables = {pattern: _row(value, members, owner) for pattern, value in weight.items()}
        rows: list[Any] = [{pattern: row[member] for pattern, row in tables.items()}
                           for member in range(members)]
    else:
        rows = _row(1.0 if weight is None else weight, members, owner)
    columns = [_by_key(row, keys, owner) for row in rows]
    return {key: tuple(column[key] for column in columns) for key in keys}


def _row(value: Any, members: int, owner: str) -> list[Any]:
    if isinstance(value, int | float):
        return [value] * members
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != members:
        raise OptionError(owner, f"weight is {value!r}, expected a number or {members} of them, "
                          "one per member")
    return list(value)


def _by_key(row: Any, keys: Collection[str], owner: str) -> dict[str, float]:
    if not isinstance(row, Mapping):
        number = _number(row, owner)
        return dict.fromkeys(keys, number)
    numbers = {pattern: _number(value, owner) for pattern, value in row.items()}
    found: dict[str, float] = {}
    idle = list(numbers)
    for key in keys:
        pattern = next((pattern for pattern in numbers if fnmatchcase(key, pattern)), None)
        if pattern is None:
            raise OptionError(owner, f"no weight pattern matches the tensor {key!r}; "
                              "end with '*' for all others")
        found[key] = numbers[pattern]
        if pattern in idle:
            idle.remove(pattern)
    if idle:
        raise OptionError(owner, f"the weight pattern {idle[0]!r} decides no tensor: none is "
                          "called so, or the patterns before it have them all")
    return found


def _number(value: Any, owner: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OptionError(owner, f"a weight is {value!r}, expected a finite number")
    return float(value)
