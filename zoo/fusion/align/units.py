"""Units: what a permutation moves, and what operations say of them: which are one, which stay, and
which move as a block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from zoo.fusion.align.labels import (
    core,
    distinct,
    is_one_number,
    joint_shape,
    mixed,
    pairs_of,
    repeated,
    spread,
    units_in,
)

# A label tensor is never compared element by element beyond this size: its units are fixed.
MOST_ELEMENTS = 1 << 23
_WORD = (1 << 64) - 1


class Units:
    """A union-find of units; blocks of units that only move as a whole; units that must not move.

    A free unit (an element of a parameter that nothing has touched yet) becomes one with whatever
    it meets. The colour of a unit tells which elements that stay it has met: units of different
    colours cannot trade places.
    """

    def __init__(self) -> None:
        self._root = [0]  # unit 0 does not exist: labels are positive or negative
        self._block = [0]  # the unit that stands for the block it is in, 0 for none
        self._free = [False]
        self._colour = [0]
        self._inside: dict[int, list[frozenset[int]]] = defaultdict(list)
        self._fixed: set[int] = set()
        self._still = 0

    def fresh(self, shape: Sequence[int], *, free: bool = False) -> Tensor:
        """Labels of new units, one for each element."""
        first, count = len(self._root), int(torch.Size(shape).numel())
        self._root.extend(range(first, first + count))
        self._block.extend([0] * count)
        self._free.extend([free] * count)
        self._colour.extend([0] * count)
        return torch.arange(first, first + count).view(tuple(shape))

    def still(self, shape: Sequence[int]) -> Tensor:
        """Labels of new elements that stay where they are."""
        count = int(torch.Size(shape).numel())
        self._still -= count
        return torch.arange(self._still, self._still + count).view(tuple(shape))

    def find(self, unit: int) -> int:
        while self._root[unit] != unit:
            self._root[unit] = self._root[self._root[unit]]
            unit = self._root[unit]
        return unit

    def roots(self, labels: Tensor) -> Tensor:
        """The labels with one name for each unit, expanded along axes where they are equal."""
        small = core(labels)
        if bool((small < 0).all()):
            return labels
        names, where = distinct(small)
        found = [self.find(name) if name > 0 else name for name in names.tolist()]
        small = torch.tensor(found, dtype=torch.int64)[where.view(small.shape)]
        for axis, length in enumerate(small.shape):
            first = small.narrow(axis, 0, 1)
            if length > 1 and bool((small == first).all()):
                small = first
        return small.expand(labels.shape)

    def block(self, unit: int) -> int:
        """The unit that stands for the block that this one is in, 0 for none."""
        above = self._block[self.find(unit)]
        above = self.find(above) if above else 0
        return 0 if above == self.find(unit) else above

    def colour(self, unit: int) -> int:
        return self._colour[self.find(unit)]

    def is_fixed(self, unit: int) -> bool:
        return self.find(unit) in self._fixed

    def fix(self, labels: Tensor) -> None:
        """These units must stay where they are."""
        self._fixed.update(self.find(unit) for unit in units_in(labels))

    def unite(self, one: int, other: int) -> int:
        """Two units are one from now on; so are the blocks that they are in."""
        keep, drop = sorted((self.find(one), self.find(other)))
        if keep == drop:
            return keep
        blocks = {self.block(keep), self.block(drop)} - {0, keep, drop}
        self._root[drop] = keep
        self._free[keep] = self._free[keep] and self._free[drop]
        self._colour[keep] = (self._colour[keep] + self._colour[drop]) & _WORD
        if drop in self._fixed:
            self._fixed.add(keep)
        self._inside[keep] += self._inside.pop(drop, [])
        self._block[keep] = min(blocks, default=0)
        if len(blocks) == 2:
            self.unite(*blocks)
        return self.find(keep)

    def unite_all(self, units: Iterable[int]) -> None:
        first, *rest = units
        for unit in rest:
            self.unite(first, unit)

    def put_in_block(self, units: Iterable[int], above: int) -> None:
        """These units move only as a whole, together with the unit `above`.

        Where they are in blocks that cross this one, they become one unit.
        """
        inside = frozenset(self.find(unit) for unit in units) - {self.find(above)}
        if not inside:
            return
        owner = self._owner(inside)
        if owner is None or len(inside) == 1:
            self.unite_all([above, *inside])
        elif owner:
            self.unite(owner, above)
        else:
            self._inside[self.find(above)].append(inside)
            for unit in inside:
                self._block[unit] = above

    def merge(self, labels: Tensor, axes: Collection[int]) -> Tensor:
        """One label along these axes, which become 1 long: what differs along them is united."""
        axes = sorted({axis % labels.dim() for axis in axes})
        small = core(self.roots(labels))
        for axis in set(range(labels.dim())) - set(axes):
            small = small.expand(*(labels.shape[a] if a == axis else small.shape[a]
                                   for a in range(labels.dim())))
        rest = [axis for axis in range(labels.dim()) if axis not in axes]
        shape = [1 if axis in axes else length for axis, length in enumerate(labels.shape)]
        count = torch.Size(small.shape[axis] for axis in axes).numel()
        rows = small.permute(*rest, *axes).reshape(-1, count)
        if count > 1:
            for row in distinct(rows[(rows > 0).any(1)], 0)[0]:
                self.unite_all(units_in(row))
                if bool((row < 0).any()):
                    self.fix(row)
        return rows.max(1).values.view(shape)

    def line(self, labels: Tensor, axis: int) -> Tensor:
        """One label for each position along an axis; what differs along other axes is united."""
        return self.merge(labels, set(range(labels.dim())) - {axis % labels.dim()}).flatten()

    def meet(self, units: Tensor, labels: Tensor) -> None:
        """Units of a parameter's axis are those of what is multiplied by it."""
        for unit, label in zip(units.tolist(), labels.tolist(), strict=True):
            if label > 0:
                self.unite(unit, label)
            else:
                self._fixed.add(self.find(unit))

    def relate(self, one: Tensor, other: Tensor) -> Tensor:
        """The labels of an elementwise function of two tensors, which meet by broadcasting.

        Units that meet one to one are one unit. Where one unit meets several that meet no other,
        they are inside its block (a weight per head meets the head's channels). Where each meets
        several, nothing can move.
        """
        one, other = self.roots(one), self.roots(other)
        shape = joint_shape(one.shape, other.shape)
        for this, that in ((one, other), (other, one)):
            if tuple(that.shape) == tuple(shape) and is_one_number(this, that):
                self._fix_free(core(this))
                return that
        small = [core(labels) for labels in (one, other)]
        both = joint_shape(*(labels.shape for labels in small))
        if both.numel() > MOST_ELEMENTS:
            return self._give_up(one, other, shape)
        self._paint(*small)
        a, b = (labels.expand(both) for labels in small)
        met = torch.where(a > 0, a, b)
        alone = (a > 0) != (b > 0)
        still = self._fix_free(met[alone])  # a scale on something that stays
        if still:
            kept = torch.isin(met, torch.tensor(still)) & alone
            met = torch.where(kept, torch.minimum(a, b), met)
        if bool((met < 0).all()):
            return self.still(shape)
        mask = (a > 0) & (b > 0) & (a != b)
        if bool(mask.any()):
            pairs, where = pairs_of(a[mask], b[mask])
            above = (spread(a, b, repeated(one, other, both)),
                     spread(b, a, repeated(other, one, both)))
            if not self._join(pairs, frozenset().union(*above)):
                return self._give_up(one, other, shape)
            met = met.clone()
            met[mask] = torch.tensor([self._inner(x, y) for x, y in pairs])[where]
        return met.expand(shape)

    def reduce(self, labels: Tensor, axes: Collection[int], *, keepdim: bool) -> Tensor:
        """The labels of a sum, norm or maximum over some axes, whose order does not matter.

        Different units that are reduced to one number form a block, for which the number stands;
        but where all numbers come from the same units, none of them moves.
        """
        axes = sorted({axis % labels.dim() for axis in axes})
        labels = self.roots(labels)
        small = core(labels)
        along = [axis for axis in axes if small.shape[axis] > 1]
        shape = [1 if axis in axes else length for axis, length in enumerate(labels.shape)]
        if along and bool((small < 0).all()):
            kept = self.still(shape)
        elif along:
            kept = self._reduced(small, along, shape)
        else:
            for axis in axes:
                labels = labels.narrow(axis, 0, 1)
            kept = labels
        return kept if keepdim else kept.reshape(
            [length for axis, length in enumerate(shape) if axis not in axes])

    def _reduced(self, small: Tensor, along: list[int], shape: list[int]) -> Tensor:
        rest = [axis for axis in range(small.dim()) if axis not in along]
        count = torch.Size(small.shape[axis] for axis in along).numel()
        for _ in range(2):
            small = self.roots(small)
            rows = small.permute(*rest, *along).reshape(-1, count)
            sets, where = distinct(rows.clamp(min=0).sort(dim=1).values, 0)
            inside = [frozenset(unit for unit in row if unit) for row in sets.tolist()]
            if len(inside) == 1 and len(inside[0]) != 1:
                return self.still(shape)
            everything = frozenset().union(*inside)
            if sum(map(len, inside)) > len(everything) or not all(inside):
                break  # the rows overlap, or some of them stay
            owners = [self._owner(units) for units in inside]
            if None not in owners:
                names = [self._standing_for(units, owner or 0)
                         for units, owner in zip(inside, owners, strict=True)]
                kept = [1 if axis in along else length for axis, length in enumerate(small.shape)]
                return torch.tensor(names)[where].view(kept).expand(shape)
            self._dissolve(everything)
        self.fix(small)
        return self.still(shape)

    def _dissolve(self, units: Iterable[int]) -> None:
        """Blocks cross other blocks, and both cannot hold: make one unit of each."""
        for unit in units:
            if above := self.block(unit):
                for inside in list(self._inside[above]):
                    if self.find(unit) in set(map(self.find, inside)):
                        self.unite_all([above, *inside])

    def _standing_for(self, units: frozenset[int], owner: int) -> int:
        if len(units) == 1:
            return next(iter(units))
        if not owner:
            owner = int(self.fresh([1]))
            self.put_in_block(units, owner)
        return owner

    def _owner(self, units: frozenset[int]) -> int | None:
        """The unit that stands for just these units, 0 when they are in no block, None when they
        are in other blocks."""
        first, *others = {self.block(unit) for unit in units} if len(units) > 1 else {0}
        if others or not first:
            return None if others else 0
        known = (frozenset(map(self.find, inside)) for inside in self._inside[first])
        return first if units in known else None

    def _join(self, pairs: list[tuple[int, int]], above: Collection[int]) -> bool:
        """Make units that meet one, or blocks of those that `above` spread over; False where
        each meets several others."""
        pairs = self._join_free(pairs)
        partners: dict[int, set[int]] = defaultdict(set)
        for x, y in pairs:
            partners[x].add(y)
            partners[y].add(x)
        if any(len(partners[x]) > 1 and len(partners[y]) > 1 for x, y in pairs):
            return False
        for unit, others in partners.items():
            if len(others) == 1 and len(partners[next(iter(others))]) > 1:
                continue  # its partner's turn
            if len(others) > 1 and unit in above:
                self.put_in_block(others, unit)
            else:
                self.unite_all([unit, *others])
        return True

    def _join_free(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Free units become one with the only unit that they meet; the pairs that are left."""
        while True:
            pairs = [(x, y) for a, b in pairs if (x := self.find(a)) != (y := self.find(b))
                     and self.block(x) != y and self.block(y) != x]
            met: dict[int, set[int]] = defaultdict(set)
            for x, y in pairs:
                if self._free[x] != self._free[y]:
                    met[x if self._free[x] else y].add(y if self._free[x] else x)
            if not met:
                return sorted(set(pairs))
            for free, units in met.items():
                if len(units) == 1:
                    self.unite(free, *units)
                else:
                    self._free[free] = False
                    self.put_in_block(units, free)
            above = {free for free, units in met.items() if len(units) > 1}
            pairs = [pair for pair in pairs if not above & set(pair)]

    def _inner(self, x: int, y: int) -> int:
        """The label of an element where these two meet: the unit, or the one inside the other."""
        x, y = self.find(x), self.find(y)
        return y if self.block(y) == x else x

    def _fix_free(self, labels: Tensor) -> list[int]:
        """Fix those of these units that are free, and name them."""
        free = [unit for unit in units_in(labels) if self._free[self.find(unit)]]
        self._fixed.update(map(self.find, free))
        return free

    def _paint(self, a: Tensor, b: Tensor) -> None:
        """Tell units by the elements that stay which they meet."""
        axes = range(-1, -1 - min(a.dim(), b.dim()), -1)
        if not any(a.shape[axis] > 1 and b.shape[axis] > 1 for axis in axes):
            return  # every unit meets every element
        both = joint_shape(a.shape, b.shape)
        a, b = (labels.expand(both).flatten() for labels in (a, b))
        for units, still in ((a, b), (b, a)):
            mask = (units > 0) & (still < 0)
            if not bool(mask.any()):
                continue
            names, where = distinct(units[mask])
            sums = torch.zeros_like(names).index_add_(0, where, mixed(still[mask]))
            for name, amount in zip(names.tolist(), sums.tolist(), strict=True):
                self._colour[name] = (self._colour[name] + amount) & _WORD

    def _give_up(self, one: Tensor, other: Tensor, shape: Sequence[int]) -> Tensor:
        self.fix(one)
        self.fix(other)
        return self.still(shape)
