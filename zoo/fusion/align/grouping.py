"""From units to groups: which units can trade places."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zoo.fusion.align.graph import Group, Place
from zoo.fusion.align.units import Units

Axis: TypeAlias = tuple[str, int]
# Of one unit: its positions along each axis, by the axis's number.
Stands: TypeAlias = dict[int, list[int]]


@dataclass(frozen=True)
class Lines:
    """What a trace found: the units along each axis [length] of the state's tensors (places) and
    of the outputs of modules (sites)."""

    units: Units
    places: Mapping[Axis, Tensor]
    sites: Mapping[Axis, Tensor]


def groups_of(lines: Lines) -> list[Group]:
    """The candidates: units with the same places, of one colour and in one block; and blocks with
    the same insides. A group inside a block comes before the group of its blocks."""
    grouping = _Grouping(lines)
    grouping.visit(0)
    return grouping.found


class _Grouping:
    """The tree of blocks and of the units inside them; 0 is its root."""

    def __init__(self, lines: Lines) -> None:
        self.units = lines.units
        self.axes = [*lines.places, *lines.sites]
        self.first_site = len(lines.places)
        self.found: list[Group] = []
        self._names: set[str] = set()
        self._known: dict[int, Any] = {}
        self._own: dict[int, Stands] = defaultdict(dict)
        for number, labels in enumerate([*lines.places.values(), *lines.sites.values()]):
            for position, label in enumerate(labels.tolist()):
                if label > 0:
                    self._own[self.units.find(label)].setdefault(number, []).append(position)
        self._inside: dict[int, list[int]] = defaultdict(list)
        seen: set[int] = set()
        for unit in list(self._own):
            while unit and unit not in seen:
                seen.add(unit)
                above = self.units.block(unit)
                self._inside[above].append(unit)
                unit = above

    def visit(self, block: int) -> list[str]:
        """Make the groups inside a block; the names of those that stand directly in it."""
        made = []
        for bucket in self._buckets(block):
            parts = [tuple(self.visit(unit)) for unit in bucket]
            if len(bucket) > 1 and not self._stays(bucket[0]):
                made += self._make(bucket, parts)
        return made

    def _buckets(self, block: int) -> list[list[int]]:
        alike: dict[Any, list[int]] = defaultdict(list)
        for unit in self._inside.get(block, ()):
            alike[self._describe(unit)].append(unit)
        return [sorted(alike[key], key=self._where) for key in sorted(alike)]

    def _describe(self, unit: int) -> Any:
        """What units have in common that can trade places."""
        if unit not in self._known:
            own = tuple((axis, len(at)) for axis, at in sorted(self._own.get(unit, {}).items()))
            inside = Counter(self._describe(part) for part in self._inside.get(unit, ()))
            self._known[unit] = (own, tuple(sorted(inside.items())), self.units.colour(unit),
                                 self.units.is_fixed(unit))
        return self._known[unit]

    def _stays(self, unit: int) -> bool:
        return self.units.is_fixed(unit) or any(map(self._stays, self._inside.get(unit, ())))

    def _where(self, unit: int) -> tuple[int, list[int]]:
        return min(self._stands(unit).items(), default=(0, []))

    def _stands(self, unit: int) -> Stands:
        """The positions of a unit and of all that is inside it, in an order that units which are
        alike share."""
        stands = {axis: list(at) for axis, at in self._own.get(unit, {}).items()}
        for bucket in self._buckets(unit):
            for part in bucket:
                for axis, at in self._stands(part).items():
                    stands.setdefault(axis, []).extend(at)
        return stands

    def _make(self, bucket: Sequence[int], parts: Sequence[tuple[str, ...]]) -> list[str]:
        stands = [self._stands(unit) for unit in bucket]
        where = [Place(*self.axes[axis], torch.tensor([unit[axis] for unit in stands]))
                 for axis in sorted(stands[0])]
        places = tuple(where[:sum(axis < self.first_site for axis in stands[0])])
        if not places:
            return []
        name = f"{places[0].key}:{places[0].axis}"
        if name in self._names:
            name += f"[{int(places[0].index[0, 0])}]"
        while name in self._names:
            name += "'"
        self._names.add(name)
        self.found.append(Group(name, len(bucket), places, tuple(where[len(places):]),
                                tuple(parts) if any(parts) else ()))
        return [name]
