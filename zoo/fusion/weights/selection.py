"""The k-th largest of values that come piece by piece: exact, in bounded memory, without sorting.

The first pass looks at a sample and brackets every k-th largest; the second counts the values
above each bracket and notes those inside, which are few. Where the sample misled, the third counts
all values by the upper half of their bits, and the fourth notes what is in the right bin.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from zoo.fusion import compiled
from zoo.fusion.precision import widened

# The wanted places among so many values of a row, given by its number, counted from the largest,
# which is 1. What lies at place 0 is infinity.
Places: TypeAlias = Callable[[int, int], Sequence[int]]
Bracket: TypeAlias = tuple[float, float]
# Given the kernels, tensors, a row, the two ends of a bracket, and where to write what is inside.
Note: TypeAlias = Callable[..., tuple[int, int, int]]

# A tensor of no more entries is not worth passes: every piece of the engine is larger.
SMALL = 1 << 16
# The sample is every so manyth entry. A prime, because what repeats in tensors are powers of two.
STRIDE = 61
# A bracket reaches so many standard deviations of the sample to both sides.
_MARGIN = 5
# How many bits the keys of the first and of the third pass drop.
_SAMPLED, _COUNTED = 15, 16
_INFINITY = 0x7F800000
# A tally sorts its keys together when so many new ones have come, or as many as it had.
_LOOSE = 1 << 20


_ONE_AT_A_TIME = threading.Lock()


class Tally:
    """How often each of some int32 keys occurs. Tallies add up."""

    def __init__(self, keys: NDArray[np.int32], times: int = 1) -> None:
        keys = np.sort(keys)
        starts = _starts(keys)
        counts = np.append(starts[1:], len(keys)) - starts if len(keys) else starts
        self._parts = [(keys[starts], counts * times)]
        self._loose = 0  # keys in all parts but the first
        self._reached: NDArray[np.int64] | None = None

    def __add__(self, other: Tally) -> Tally:
        both = object.__new__(Tally)
        both._parts = [*self._parts, *other._parts]
        both._loose = self._loose + sum(len(keys) for keys, _ in other._parts)
        both._reached = None
        if both._loose > len(both._parts[0][0]) + _LOOSE:
            both._join()
        return both

    def largest(self, place: int) -> int | None:
        """The key at this place from the largest; None outside of 1 to the count of all."""
        if self._reached is None:
            with _ONE_AT_A_TIME:  # several threads come here at once, and one does the work
                if self._reached is None:
                    self._join()
                    self._reached = self._parts[0][1][::-1].cumsum()
        keys, found = self._parts[0][0][::-1], np.searchsorted(self._reached, place)
        return int(keys[found]) if place > 0 and found < len(keys) else None

    def _join(self) -> None:
        parts = self._parts
        keys = np.concatenate([keys for keys, _ in parts])
        order = np.argsort(keys)
        keys, counts = keys[order], np.concatenate([counts for _, counts in parts])[order]
        starts = _starts(keys)
        self._parts = [(keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts)]
        self._loose = 0


def _starts(ordered: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where each run of equal keys begins."""
    begins = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
    return np.flatnonzero(begins)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass adds up.

    exact: whether the keys are the values' own; else they lack their last bits, and there are no
    brackets. size: values in each row. above: how many of them lie above each bracket, [rows,
    places]. tallies: of those inside each bracket; without brackets of all, one a row.
    """

    exact: bool
    size: int
    above: NDArray[np.int64]
    tallies: list[list[Tally]]

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.exact, self.size + other.size, self.above + other.above,
                    [[one + two for one, two in zip(*rows, strict=True)]
                     for rows in zip(self.tallies, other.tallies, strict=True)])

    def at(self, row: int, slot: int, place: int) -> int | None:
        """The key at a place of a row, if it is inside the bracket of this slot."""
        return self.tallies[row][slot].largest(place - int(self.above[row, slot]))


def magnitudes(start: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each |τᵢ| in float32, which decides what a trim keeps."""
    return [(widened(tensor) - start).abs_().float() for tensor in tensors]


def note_magnitudes(
    kernels: ModuleType, tensors: Sequence[Tensor], row: int, low: np.float32, high: np.float32,
    inside: NDArray[np.float32],
) -> tuple[int, int, int]:
    """How many there are of one member, above a bracket, and inside, which are written down."""
    start, member, size = tensors[0], tensors[row + 1], tensors[0].numel()
    above, count = kernels.note_changes(start.data_ptr(), member.data_ptr(), size, low, high,
                                        inside)
    return size, above, count


def look(
    values: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], measured: Sequence[Seen],
    places: Places, *, whole: bool = False, note: Note | None = None,
) -> Seen | None:
    """What a piece adds to the next pass; None when the values at all places are known.

    values: makes of entries of the tensors rows of float32 values, each of the same length.
    tensors: each [n]. measured: the sums of the passes that are complete. whole: this piece is all
    that there is, and one pass does. note: how the kernels do it, where there are any.
    """
    if not measured:
        if whole:
            passes: tuple[Seen, ...] = ()
            while len(passes) < 2:
                seen = look(values, tensors, passes, places, note=note)
                assert seen is not None
                passes += (seen,)
            return seen if complete(passes, places) else _picked(values(*tensors), places)
        size = tensors[0].numel()
        sample = [tensor[::STRIDE if size > 8 * STRIDE else 1] for tensor in tensors]
        return _counted(values(*sample), round(size / max(len(sample[0]), 1)), _SAMPLED)
    if complete(measured, places):
        return None
    if measured[-1].exact:
        return _counted(values(*tensors), 1, _COUNTED)
    brackets = _brackets(measured[-1], places, sampled=len(measured) == 1)
    kernels = compiled.kernels(*tensors) if note else None
    if note is None or kernels is None:
        return _noted(values(*tensors), brackets)
    return _noted_by(partial(note, kernels, tensors), tensors[0].numel(), brackets)


def complete(measured: Sequence[Seen], places: Places) -> bool:
    """Whether no further pass is needed."""
    seen = measured[-1]
    return seen.exact and (len(measured) == 4 or all(
        place <= 0 or seen.at(row, slot, place) is not None
        for row in range(len(seen.tallies))
        for slot, place in enumerate(_within(places, seen.size, row))))


def divided(
    measured: Sequence[Seen], places: Places
) -> tuple[Sequence[Seen], Sequence[Seen]]:
    """The passes of a first selection, and those after it."""
    for passes in (1, 2, 4):
        if passes <= len(measured) and complete(measured[:passes], places):
            return measured[:passes], measured[passes:]
    return measured, ()


def at_places(measured: Sequence[Seen], places: Places) -> list[list[float]]:
    """The values at the wanted places of each row. measured: the sums of all passes."""
    seen = measured[-1]
    return [[_float(seen.at(row, slot, place), -_INFINITY - 1) if place > 0 else float("inf")
             for slot, place in enumerate(_within(places, seen.size, row))]
            for row in range(len(seen.tallies))]


def at_places_of(rows: Sequence[Tensor], places: Places) -> list[list[float]]:
    """The same for rows of values that are all there, each [n]."""
    found = []
    for number, row in enumerate(rows):
        size = row.numel()
        ascending = [size - place for place in _within(places, size, number)]  # size is infinity
        inside = [place for place in ascending if place < size]
        ordered = np.partition(row.flatten().cpu().numpy(), inside or 0) if size else ()
        found.append([float(ordered[place]) if place < size else float("inf")
                      for place in ascending])
    return found


def _within(places: Places, size: int, row: int) -> list[int]:
    return [min(max(place, 0), size) for place in places(size, row)]


def _picked(rows: Sequence[Tensor], places: Places) -> Seen:
    """The values at the places of rows that are all there."""
    picked = np.array(at_places_of(rows, places), np.float32)
    above = np.array([_within(places, row.numel(), number)
                      for number, row in enumerate(rows)]) - 1
    return Seen(True, rows[0].numel(), above, [[Tally(_keys(value[None])) for value in row]
                                               for row in picked])


def _counted(rows: Sequence[Tensor], times: int, dropped: int) -> Seen:
    """All keys of these values without their last bits, each standing for so many."""
    return Seen(False, rows[0].numel() * times, np.zeros((len(rows), 1), np.int64),
                [[Tally(_keys(row.cpu().numpy()) >> dropped, times)] for row in rows])


def _noted(rows: Sequence[Tensor], brackets: Sequence[Sequence[Bracket]]) -> Seen:
    """The values above and inside of the brackets of each row."""
    above: list[list[int]] = []
    tallies: list[list[Tally]] = []
    for row, wanted in zip(rows, brackets, strict=True):
        array = row.cpu().numpy()
        above.append([])
        tallies.append([])
        for low, high in wanted:
            chosen = array >= low
            reached = int(np.count_nonzero(chosen))
            chosen &= array <= high
            inside = array[chosen]
            above[-1].append(reached - len(inside))
            tallies[-1].append(Tally(_keys(inside)))
    return Seen(True, rows[0].numel(), np.array(above), tallies)


def _noted_by(
    note: Callable[..., tuple[int, int, int]], size: int, brackets: Sequence[Sequence[Bracket]]
) -> Seen:
    """The same without having the values."""
    inside = np.empty(size, np.float32)
    above: list[list[int]] = []
    tallies: list[list[Tally]] = []
    for row, wanted in enumerate(brackets):
        above.append([])
        tallies.append([])
        for low, high in wanted:
            there, more, count = note(row, np.float32(low), np.float32(high), inside)
            above[-1].append(more)
            tallies[-1].append(Tally(_keys(inside[:count])))
    return Seen(True, there, np.array(above), tallies)


def _brackets(seen: Seen, places: Places, sampled: bool) -> list[list[Bracket]]:
    """Around each wanted place: what the sample leaves possible, or the bin that it is in."""
    dropped = _SAMPLED if sampled else _COUNTED
    brackets = []
    for number, (tally,) in enumerate(seen.tallies):
        row = []
        for place in _within(places, seen.size, number):
            spread = (STRIDE * place * (1 - place / max(seen.size, 1))) ** 0.5 + STRIDE
            margin = int(_MARGIN * spread) if sampled else 0
            low, high = tally.largest(place + margin), tally.largest(place - margin)
            row.append((_float(None if low is None else low << dropped, -_INFINITY - 1),
                        _float(None if high is None else ((high + 1) << dropped) - 1, _INFINITY)))
        brackets.append(row)
    return brackets


def _keys(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Whole numbers that sort like the values: their bits, turned round where they are negative."""
    bits = np.ascontiguousarray(values).view(np.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _float(key: int | None, otherwise: int) -> float:
    key = max(-_INFINITY - 1, min(otherwise if key is None else key, _INFINITY))
    return float(np.int32(key ^ 0x7FFFFFFF if key < 0 else key).view(np.float32))
