"""Choosing among candidates on validation: how far each is tried, and which gain counts.

All are tried on a little, the better ones on more (successive halving: Jamieson 2016,
arXiv:1502.07943). Answers are to images that a candidate did not learn from. Of those that are as
good as the best but for noise the simplest is taken (the one-standard-error rule: Breiman 1984,
"Classification and regression trees"), and choosing itself is tried on folds that it did not see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from zoo.errors import DataError
from zoo.measures import paired_gain

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C")

# Of a kind's candidates one in three goes on, and two at least.
_KEEP, _FEW = 3, 2
# An accuracy on fewer images tells nothing, nor does a head of fewer epochs.
_LEAST, _EPOCHS = 256, 10
# Of the seconds, when each rung ends; what is left is for the final fit.
_ENDS = (0.35, 0.6, 0.85)


@dataclass(frozen=True, slots=True)
class Rung:
    """How much a candidate is tried with: images, and epochs where it trains."""

    images: int
    epochs: int


def rungs(images: int, epochs: int) -> list[Rung]:
    """A ninth, a third and all of the work: of the images as long as many are left, then of the
    epochs. Where there is little of both, fewer."""
    found: list[Rung] = []
    for share in (1 / 9, 1 / 3, 1.0):
        rows = min(images, max(_LEAST, round(share * images)))
        rung = Rung(rows, max(min(_EPOCHS, epochs), round(epochs * share * images / rows)))
        if rung not in found:
            found.append(rung)
    return found


class Limit(Protocol):
    def now(self) -> float:
        """Seconds from any start."""

    def admits(self, rung: int, tried: int, expected: float) -> bool:
        """Whether another candidate may be tried in this rung, where so many have been. expected:
        the seconds that it will take, as far as is known."""


@dataclass(frozen=True, slots=True)
class Trials:
    """At most so many candidates."""

    most: int

    def now(self) -> float:
        return 0.0

    def admits(self, rung: int, tried: int, expected: float) -> bool:
        return rung > 0 or tried < self.most


class Seconds:
    """About so many seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds = seconds
        self.now = clock
        self.start = clock()

    def admits(self, rung: int, tried: int, expected: float) -> bool:
        end = _ENDS[min(rung, len(_ENDS) - 1)] * self.seconds
        return self.now() - self.start + expected < end


def halve(
    candidates: Sequence[C],
    levels: Sequence[Rung],
    attempt: Callable[[C, Rung], tuple[float, float] | None],
    limit: Limit,
    kind: Callable[[C], object] = lambda candidate: None,
    entering: Callable[[int, int], object] = lambda rung, count: None,
) -> None:
    """Try candidates in their order on the first rung, and the better ones on the next ones; on
    each at least one, the fastest if there is no time for any.

    attempt: the score of a candidate, the higher the better, or None where it failed. kind:
    candidates compete with those of their own kind, until the last rung: what trains is worse with
    little than what does not. entering: told before each rung its number, and how many candidates
    wait for it.
    """
    waiting = list(candidates)
    pace: dict[int, float] = {}  # seconds for an image and epoch, in the rung before
    for number, rung in enumerate(levels):
        if not waiting:
            return
        entering(number, len(waiting))
        scores: list[tuple[tuple[float, float], C]] = []
        work = rung.images * rung.epochs
        expected = [pace.get(id(candidate), 0.0) * work for candidate in waiting]
        fastest = expected.index(min(expected))
        tried = 0
        for place, candidate in enumerate(waiting):
            last = place == len(waiting) - 1
            if not limit.admits(number, tried, expected[place]):
                if tried or not last:
                    continue
                candidate = waiting[fastest]
            tried += 1
            start = limit.now()
            score = attempt(candidate, rung)
            pace[id(candidate)] = (limit.now() - start) / work
            if score is not None:
                scores.append((score, candidate))
        scores.sort(key=lambda found: found[0], reverse=True)
        left = {name: max(math.ceil(count / _KEEP), _FEW) for name, count in
                Counter(kind(candidate) for _, candidate in scores).items()}
        waiting = []
        for _, candidate in scores:
            if left[kind(candidate)]:
                left[kind(candidate)] -= 1
                waiting.append(candidate)


def deal(labels: Tensor, folds: int, seed: int) -> tuple[Tensor, Tensor]:
    """An order of the images [N] of which every beginning has each class' share, to within one
    image, and the fold [N] of each image, which has about the same share of every class of every
    beginning.

    Raises DataError for fewer images than a choice can be made on.
    """
    import torch

    least = max(20, 2 * folds)
    if len(labels) < least:
        raise DataError(f"it chooses by {folds}-fold cross-validation, and {len(labels)} images "
                        f"are too few for that; give {least} or more")
    # RandomState's stream is frozen for good; torch's and default_rng's may change.
    shuffled = torch.from_numpy(np.random.RandomState(seed).permutation(len(labels)))
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    kinds = labels[grouped]
    place = torch.arange(len(labels)) - first[kinds]  # within its class
    order = grouped[((place + 0.5) / counts[kinds]).argsort(stable=True)]
    fold = torch.empty_like(labels)
    fold[grouped] = (place + kinds) % folds  # rare classes do not all begin in the first
    return order, fold


@dataclass(frozen=True, slots=True)
class Answered:
    """What a candidate came to on images that it did not learn from.

    correct: bool [N], for the same images in all candidates. nll: in nats. rank: 0 for a single
    member, the higher the less simple. toll: what its cost takes off its accuracy, 0.01 a point.
    """

    name: str
    correct: Tensor
    nll: float
    rank: int
    toll: float = 0.0

    @property
    def accuracy(self) -> float:
        return float(self.correct.double().mean())

    @property
    def score(self) -> float:
        return self.accuracy - self.toll


@dataclass(frozen=True, slots=True)
class Decision:
    """chosen: what to take. leader: the best score. single: the best single member. nested: by how
    much choosing beat the best single, on the folds that it did not see. margin: between leader
    and chosen, and its standard error. doubted: the choice was good, and choosing was not."""

    chosen: Answered
    leader: Answered
    single: Answered
    nested: float
    margin: tuple[float, float]
    doubted: bool


def decide(candidates: Sequence[Answered], fold: Tensor, errors: float) -> Decision:
    """The simplest candidate whose score is less than `errors` standard errors below the best;
    never one below the best single member; this one where choosing does not stand on folds that
    it did not see.

    candidates: at least one of rank 0. fold: int [N].
    """
    chosen, leader, single = _pick(candidates, errors)
    gained = 0.0
    for number in sorted(set(fold.tolist())):
        seen = fold != number
        rest = [replace(one, correct=one.correct[seen]) for one in candidates]
        places = [next(place for place, one in enumerate(rest) if one is found)
                  for found in _pick(rest, errors)[::2]]
        mine, alone = (candidates[place] for place in places)
        share = float((~seen).double().mean())
        gained += share * (float(mine.correct[~seen].double().mean()) - mine.toll
                           - float(alone.correct[~seen].double().mean()) + alone.toll)
    doubted = chosen.rank > 0 and gained < -1e-9
    if doubted:
        chosen = single
    gain = paired_gain(leader.correct, chosen.correct)
    return Decision(chosen, leader, single, gained, (leader.score - chosen.score, gain["error"]),
                    doubted)


def _pick(
    candidates: Sequence[Answered], errors: float
) -> tuple[Answered, Answered, Answered]:
    """The one to take, the best one, and the best single member."""
    ordered = sorted(candidates, key=lambda one: (-one.score, one.rank, one.nll))
    leader = ordered[0]
    single = next(one for one in ordered if one.rank == 0)
    near = [one for one in ordered if one.score >= single.score and _is_near(one, leader, errors)]
    return min(near, key=lambda one: one.rank), leader, single


def _is_near(one: Answered, leader: Answered, errors: float) -> bool:
    behind = leader.score - one.score
    return behind <= 0 or behind < errors * paired_gain(leader.correct, one.correct)["error"]


def in_words(decision: Decision, count: int, errors: float, *, penalised: bool = False) -> str:
    """Why the decision is what it is. count: how many candidates were tried to the end.
    penalised: cost counts."""
    chosen, leader, single = decision.chosen, decision.leader, decision.single
    images = len(chosen.correct)
    begin = (f"Of {count} candidates, {leader.name} has the best score: it answers "
             f"{leader.accuracy:.1%} of {images:,} images right that it did not learn from.")
    cost = " after its cost" if penalised else ""
    if decision.doubted:
        end = (f" But choosing like this on some folds loses {_points(-decision.nested)} to the "
               f"best single member on the others: {single.name} is taken.")
    elif chosen is leader and chosen is single:
        end = f" No fusion is better than this single member{cost}."
    elif chosen is leader:
        gain = paired_gain(chosen.correct, single.correct)
        end = (f" That is {_points(chosen.score - single.score)} more than the best single member, "
               f"{single.name}{cost} (95 % interval of the accuracies' difference: "
               f"{100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}), and nothing simpler comes "
               "as near.")
    else:
        margin, error = decision.margin
        what = "the best single member" if chosen is single else "simpler"
        end = (f" {chosen.name} is {what} and {_points(margin)} behind{cost}, less than "
               f"{errors:g} standard errors of the difference ({_points(error)} each), which is "
               "what chance does: it is taken.")
    return begin + end


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"
