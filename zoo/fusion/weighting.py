"""Which weight each member has in each tensor, and which value each option."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from zoo.errors import OptionError
from zoo.fusion.depth import depths
from zoo.options import by_member, by_tensor
from zoo.registry import resolve
from zoo.specs import MEASURED_OVER, SCOPES, FusionSpec, reach

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
    return _for_members("weight", 1.0 if weight is None else weight, depths(keys), keys, members,
                        owner)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a fusion as its strategy sees them. common: those that are the same for all
    tensors. own: by key those that are not, the same ones for every key."""

    common: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def resolve_options(
    spec: FusionSpec, strategy: Callable[..., Any], options: Mapping[str, Any],
    keys: Collection[str], members: int, *, fused: Collection[str] | None = None,
) -> Settings:
    """Each tensor's options, those of the type `PerMember` one number per member.

    strategy: what `spec.build` names. options: as `checked` gives them. A `PerMember` is
    written like a weight (`resolve_weights`). Other numbers may be lists along the depth, and they
    and truth values `{pattern: value}`. keys: the tensors' keys, as for the weights. fused: those
    of them that the strategy sees; None means all. Only these have options, and patterns may leave
    the others out.

    Raises OptionError as `resolve_weights` does; and for what differs between tensors but decides
    what the strategy sees or measures of more than one of them.
    """
    per_member, per_tensor = by_member(spec, strategy), by_tensor(spec, strategy)
    common: dict[str, Any] = {}
    differing: dict[str, dict[str, Any]] = {}
    depth_of = depths(keys)
    fused = keys if fused is None else fused
    for name, value in options.items():
        if name in per_member:
            found: dict[str, Any] = dict(_for_members(name, value, depth_of, fused, members,
                                                      spec.name))
        elif name in per_tensor and isinstance(value, list | Mapping):
            found = _by_key(name, value, depth_of, fused, spec.name)
        else:
            common[name] = value
            continue
        values = [found[key] for key in fused]
        if all(each == values[0] for each in values):
            common[name] = values[0] if values else value
        else:
            differing[name] = found
    _want_by_tensor(spec, {**options, **common}, differing)
    return Settings(common, {key: {name: found[key] for name, found in differing.items()}
                             for key in fused} if differing else {})


def _want_by_tensor(
    spec: FusionSpec, options: Mapping[str, Any], differing: Collection[str]
) -> None:
    """Raises OptionError for an option that differs between tensors and must not."""
    declared = [each for each in (spec.scope, spec.measured_over) if not isinstance(each, str)]
    for name in differing:
        if any(name in each for each in declared):
            raise OptionError(spec.name, f"{name} differs between tensors, and it decides how they "
                              "are cut; give one value for all")
    for name in differing:
        why = ""
        if reach(spec.scope, options, SCOPES) == "model":
            why = "this strategy sees all tensors at once"
        elif (spec.measure and reach(spec.measured_over, options, MEASURED_OVER) == "model"
              and name in inspect.signature(resolve(spec.measure, spec.name)).parameters):
            why = "what it decides is measured over the whole model"
            if not isinstance(spec.measured_over, str):
                why += "".join(f"; {option}={value!r} measures each tensor for itself"
                               for option, values in spec.measured_over.items()
                               for value, over in values.items() if over == "tensor")
        if why:
            raise OptionError(spec.name, f"{name} differs between tensors, and {why}; give one "
                              "value for all")


def want_shares(strategy: str, weights: Mapping[str, Sequence[float]]) -> None:
    """Raises OptionError for weights that are no shares: all 0 or more, and one above."""
    for key, row in weights.items():
        if min(row) < 0 or max(row) == 0:
            raise OptionError(strategy, f"the weights {tuple(row)} of {key!r} are no shares, "
                              "expected 0 or more, and one of them above")


def _for_members(
    name: str, value: Any, depth_of: Mapping[str, float], wanted: Collection[str], members: int,
    owner: str,
) -> dict[str, tuple[float, ...]]:
    if isinstance(value, Mapping):
        tables = {pattern: _row(name, each, members, owner) for pattern, each in value.items()}
        rows: list[Any] = [{pattern: row[member] for pattern, row in tables.items()}
                           for member in range(members)]
    else:
        rows = _row(name, value, members, owner)
    columns = [_by_key(name, row, depth_of, wanted, owner, whole=True) for row in rows]
    return {key: tuple(column[key] for column in columns) for key in wanted}


def _row(name: str, value: Any, members: int, owner: str) -> list[Any]:
    if isinstance(value, int | float):
        return [value] * members
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != members:
        raise OptionError(owner, f"{name} is {value!r}, expected a number or {members} of them, "
                          "one per member")
    return list(value)


def _by_key(
    name: str, row: Any, depth_of: Mapping[str, float], wanted: Collection[str], owner: str,
    whole: bool = False,
) -> dict[str, Any]:
    """One value for each tensor, at least the wanted ones. whole: every one must be a number."""
    if not isinstance(row, Mapping):
        points = _points(name, row, owner, whole)
        return {key: at(points, depth) for key, depth in depth_of.items()}
    for pattern in row:
        if not isinstance(pattern, str):
            raise OptionError(owner, f"a {name} pattern is {pattern!r}, expected text such as "
                              "'blocks.*'")
    lines = {pattern: _points(name, value, owner, whole) for pattern, value in row.items()}
    found: dict[str, Any] = {}
    idle = list(lines)
    for key, depth in depth_of.items():
        pattern = next((pattern for pattern in lines if fnmatchcase(key, pattern)), None)
        if pattern is None and key not in wanted:
            continue
        if pattern is None:
            raise OptionError(owner, f"no {name} pattern matches the tensor {key!r}; "
                              "end with '*' for all others")
        found[key] = at(lines[pattern], depth)
        if pattern in idle:
            idle.remove(pattern)
    if idle:
        raise OptionError(owner, f"the {name} pattern {idle[0]!r} decides no tensor: none is "
                          "called so, or the patterns before it have them all")
    return found


def _points(name: str, value: Any, owner: str, whole: bool) -> list[Any]:
    """The numbers from input to output, evenly spaced; a single one holds everywhere."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    if not several and not whole:
        return [value]
    values = value if several else [value]
    for number in values or [None]:
        if (isinstance(number, bool) or not isinstance(number, int | float)
                or not math.isfinite(number)):
            raise OptionError(owner, f"a {name} is {number!r}, expected a finite number")
    return [float(number) for number in values]


def at(points: Sequence[Any], depth: float) -> Any:
    """The number at this depth of numbers from input to output."""
    place = depth * (len(points) - 1)
    if abs(place - round(place)) < 1e-9:  # a layer for each point, but for rounding
        place = round(place)
    before = min(int(place), max(len(points) - 2, 0))
    after = min(before + 1, len(points) - 1)
    one, other = points[before], points[after]
    far = place - before
    return one if one == other or not far else (1 - far) * one + far * other
