"""Candidates on validation: which values of some numbers are best, by trying them.

Values that are listed are all tried, ranges at a few even places; then what was best is looked at
ever closer, one range at a time. Few candidates of something that costs a pass over the data each,
and the whole curve is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from zoo.errors import OptionError


class Comparable(Protocol):
    def __lt__(self, other: Any, /) -> bool: ...


S = TypeVar("S", bound=Comparable)


@dataclass(frozen=True, slots=True)
class Range:
    """All numbers from low to high; of a whole range the whole ones."""

    low: float
    high: float
    whole: bool = False

    def at(self, value: float) -> float:
        """The number of the range that is nearest to this one."""
        value = min(max(value, self.low), self.high)
        # Twelve digits are more than a search can tell apart, and 0.30000000000000004 is ugly.
        return round(value) if self.whole else float(f"{value:.12g}")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True, slots=True)
class Tried(Generic[S]):
    """One candidate: its values by name, and its score."""

    values: Mapping[str, Any]
    score: S


def read_space(
    owner: str, space: Mapping[str, Any], whole: Sequence[str] = ()
) -> dict[str, tuple[Any, ...] | Range]:
    """What to try of each name: a list's values, or a range, written `(low, high)` or "low..high".

    owner: the strategy's name. whole: names that are whole numbers. Raises OptionError for an empty
    list, a range that is none, or anything else.
    """
    if not isinstance(space, Mapping) or not space:
        raise OptionError(owner, f"search is {space!r}, expected what to try by option: "
                          "{'scale': '0.3..1.5', 'density': [0.1, 0.2]}")
    return {name: _read(owner, name, given, name in whole) for name, given in space.items()}


def _read(owner: str, name: str, given: Any, whole: bool) -> tuple[Any, ...] | Range:
    if isinstance(given, list) and given:
        return tuple(given)
    ends: Sequence[Any] = given if isinstance(given, tuple) else ()
    if isinstance(given, str):
        ends = given.split("..", 1)
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise OptionError(owner, f"search tries {given!r} for {name!r}, expected a list of values, "
                          "or a range from a lower to a higher number: '0.3..1.5' or (0.3, 1.5)")
    return Range(low, high, whole)


def best(
    space: Mapping[str, tuple[Any, ...] | Range],
    evaluate: Callable[[Mapping[str, Any]], S],
    *,
    places: int = 5,
    rounds: int = 3,
) -> tuple[Tried[S], list[Tried[S]]]:
    """The candidate of the highest score, and all that were tried, in order.

    space: by name, as `read_space` gives it. evaluate: the score of values by name. places: of a
    range that are tried at first, 2 or more. rounds: in each, two further places of each range are
    tried, half as far from the best as those before. Of equal scores the first counts.
    """
    tried: dict[tuple[Any, ...], Tried[S]] = {}

    def attempt(values: Mapping[str, Any]) -> None:
        key = tuple(map(repr, values.values()))
        if key not in tried:
            tried[key] = Tried(dict(values), evaluate(values))

    ranges = {name: part for name, part in space.items() if isinstance(part, Range)}
    first = {name: tuple(_places(part, places)) if isinstance(part, Range) else part
             for name, part in space.items()}
    for values in itertools.product(*first.values()):
        attempt(dict(zip(first, values, strict=True)))
    step = 1 / (places - 1)
    for _ in range(rounds):
        step /= 2
        for name, part in ranges.items():
            top = _top(tried.values()).values
            for side in (-step, step):
                attempt({**top, name: part.at(top[name] + side * (part.high - part.low))})
    return _top(tried.values()), list(tried.values())


def _places(part: Range, places: int) -> Iterator[float]:
    for place in range(places):
        yield part.at(part.low + (part.high - part.low) * place / (places - 1))


def _top(tried: Any) -> Tried[Any]:
    found, *others = tried
    for other in others:
        if found.score < other.score:
            found = other
    return found  # type: ignore[no-any-return]
