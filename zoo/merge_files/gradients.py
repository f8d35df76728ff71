"""What mergekit's settings come to, tensor by tensor: conditions, gradients, slices.

A setting is a scalar, a gradient (a list of scalars along the layers of a slice), or a list of
conditions, `{filter: part of a name, value: scalar or gradient}`. Scopes are asked from the nearest
(a model's own) to the farthest (the document's) until one has an answer.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from zoo.fusion.depth import depths, is_after, layers
from zoo.fusion.weighting import at

# The conditions of a slice in the order in which they are asked; the last may have no filter.
Conditions: TypeAlias = Sequence[tuple[str | None, Any]]


def conditions(setting: Any) -> Iterator[tuple[str | None, Any]]:
    """The filters of a setting and their values, up to the first that holds for all tensors.

    Raises TypeError for a list in which conditions and values are mixed, and for a filter that is
    no text.
    """
    told = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(each, Mapping) for each in told):
        yield None, setting
        return
    for each in told:
        if not isinstance(each, Mapping) or "value" not in each:
            raise TypeError("expected conditions, each with 'value' and perhaps 'filter'")
        part = each.get("filter")
        if part is not None and not isinstance(part, str):
            raise TypeError(f"a filter is {part!r}, expected text")
        yield None if part in (None, "*") else part, each["value"]
        if part in (None, "*"):
            return


def spread(
    slices: Sequence[Conditions], lengths: Sequence[int | None], keys: Callable[[], Collection[str]]
) -> Any:
    """A setting as an option of ours: a scalar, numbers along the depth, or either by pattern.

    slices: the conditions in each. lengths: their numbers of layers; of a whole model None. keys:
    gives those of the tensors; asked only if tensors differ. Tensors before the layers belong to
    the first slice, those after them to the last, and both have a gradient's first value.

    Raises KeyError with the name of a tensor for which no condition holds.
    """
    first = slices[0]
    if first[0][0] is None and not isinstance(first[0][1], list) and all(
            each[0] == first[0] for each in slices):
        return first[0][1]
    names = list(keys())
    number_of = layers(names)
    places = list(_places([length if length is not None else _count(number_of)
                           for length in lengths]))

    def value(name: str) -> Any:
        number = number_of.get(name)
        if number is None:
            return evaluated(slices[-1 if is_after(name) else 0], name, 0.0)
        which, t = places[number]
        return evaluated(slices[which], name, t)

    wanted = {name: value(name) for name in names}
    for name, found in wanted.items():
        if found is None:
            raise KeyError(name)
    table: dict[str, Any] = {}
    for part in dict.fromkeys(part for each in slices for part, _ in each):
        row = [evaluated(slices[which], part or "", t) for which, t in places]
        if not row or None in row:
            continue
        alone = next((told for each, told in slices[0] if each == part), None)
        table["*" if part is None else f"*{glob.escape(part)}*"] = (
            row[0] if all(each == row[0] for each in row) or isinstance(row[0], int)
            else alone if len(slices) == 1 else row)
    depth_of = depths(names)

    def told(name: str) -> Any:
        found = next((table[pattern] for pattern in table if fnmatchcase(name, pattern)), None)
        return at(found, depth_of[name]) if isinstance(found, list) else found

    own = {glob.escape(name): each for name, each in wanted.items() if told(name) != each}
    table = own | table
    used = {next(pattern for pattern in table if fnmatchcase(name, pattern)) for name in names}
    table = {pattern: each for pattern, each in table.items() if pattern in used}
    return table["*"] if table.keys() == {"*"} else table


def evaluated(asked: Conditions, name: str, t: float) -> Any:
    """What a tensor of this name has at a place of its slice, 0 to 1; None if nothing holds."""
    for part, value in asked:
        if part is None or part in name:
            return _along(value, t)
    return None


def _along(value: Any, t: float) -> Any:
    if not isinstance(value, list):
        return value
    if isinstance(value[0], float):
        return at(value, t)
    return value[int(t * (len(value) - 1))]  # truth values and counts have nothing between


def _places(lengths: Sequence[int]) -> Iterator[tuple[int, float]]:
    """The slice of each layer, and the place in it."""
    for which, length in enumerate(lengths):
        for number in range(length):
            yield which, number / (length - 1) if length > 1 else 1.0


def _count(number_of: Mapping[str, int]) -> int:
    return max(number_of.values(), default=-1) + 1
