"""Ensemble selection: Caruana et al. 2004, "Ensemble selection from libraries of models",
doi:10.1145/1015330.1015432."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.outputs.calibration import at_labels
from zoo.fusion.outputs.pool import Pool, mean_of_probabilities


class GreedySelection(Pool):
    """The mean of probabilities of members picked one after another, with replacement: each time
    the one that improves the mean most. Every bag picks from a part of the members, drawn at
    random; the picks of all bags are counted together.

    members: M. num_classes: C. Takes logits [M, B, C] and gives log-probabilities [B, C]. How often
    each member was picked is in the state dict, `counts` [M]. On the data it was fitted to, it is
    never worse by the metric than the best single member. The parts are drawn from torch's
    generator, which zoo.fuse seeds. Raises NotFitted when used before.

    Options:
        metric: what is improved, "nll" or "accuracy" (of equal ones, the lower NLL)
        bags: how many times it picks, 1 or more
        share: the part of the members that a bag may pick from, in (0, 1]; at least two of them
        rounds: the most picks of a bag, 1 or more; the best of its means on the way counts
        start: what a bag begins with: the "best" of its members, "none", or this many best
        calibrate: give each member a temperature first, found on the same data
        recalibrate: give the mean a temperature at last, found on the same data
    """

    learns = True
    counts: Tensor

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        metric: Literal["nll", "accuracy"] = "nll",
        bags: int = 20,
        share: float = 0.5,
        rounds: int = 30,
        start: Literal["best", "none"] | int = "best",
        calibrate: bool = False,
        recalibrate: bool = False,
    ) -> None:
        super().__init__("greedy_selection", members, num_classes, calibrate=calibrate,
                         recalibrate=recalibrate)
        wrong = [
            f"{name} is {value!r}, expected {expected}" for name, value, right, expected in (
                ("metric", metric, metric in ("nll", "accuracy"), "'nll' or 'accuracy'"),
                ("bags", bags, bags >= 1, "1 or more"),
                ("share", share, 0 < share <= 1, "a part in (0, 1]"),
                ("rounds", rounds, rounds >= 1, "1 or more"),
                ("start", start, start in ("best", "none")
                 or (isinstance(start, int) and start >= 1), "'best', 'none' or 1 or more"),
            ) if not right]
        if wrong:
            raise OptionError("greedy_selection", wrong[0])
        self.metric = metric
        self.bags = bags
        self.share = share
        self.rounds = rounds
        self.start = {"best": 1, "none": 0}.get(start, start) if isinstance(start, str) else start
        self.register_buffer("counts", torch.ones(members, dtype=torch.int64))

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        return mean_of_probabilities(logits, self.counts / self.counts.sum())

    def learn(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None
    ) -> Mapping[str, Any]:
        with torch.no_grad():
            library = _Library(logits, labels, self.metric)
            size = min(max(2, round(self.share * self.members)), self.members)
            parts = [torch.randperm(self.members)[:size].sort().values for _ in range(self.bags)]
            bagged = torch.stack([self._picked(library, part) for part in parts]).sum(0)
            best = library.ranking(torch.arange(self.members))[0]
            alone = torch.eye(self.members, dtype=torch.int64)[best]
            # Not the walk over all members: on these images it would win by choosing noise.
            counts = max((bagged, alone), key=library.score)
            self.counts.copy_(counts)
        return {"counts": counts.tolist()}

    def _picked(self, library: _Library, part: Tensor) -> Tensor:
        """How often each member [M] was picked from this part of the members."""
        counts = torch.zeros(self.members, dtype=torch.int64)
        counts[library.ranking(part)[:self.start]] += 1
        best, best_score = counts.clone(), library.score(counts)
        for _ in range(self.rounds):
            counts[library.next(counts, part)] += 1
            score = library.score(counts)
            if score > best_score:
                best, best_score = counts.clone(), score
        return best


class _Library:
    """Members' answers to labelled images: how good means of them are."""

    def __init__(self, logits: Tensor, labels: Tensor, metric: str) -> None:
        likely = logits.log_softmax(2)
        self.labels = labels
        self.true = at_labels(likely, labels).exp()  # (M, N)
        self.probabilities = likely.exp() if metric == "accuracy" else None  # (M, N, C)

    def score(self, counts: Tensor) -> tuple[float, float]:
        """Accuracy (0 where the metric is NLL) and −NLL of the mean in which member i counts
        counts[i] times; an empty one is worse than any other."""
        total = counts.sum()
        if not total:
            return -1.0, -torch.inf
        sums = counts.double()[None]
        return self._scores(sums @ self.true, None if self.probabilities is None else
                            torch.tensordot(sums, self.probabilities, 1), total)[0]

    def ranking(self, part: Tensor) -> Tensor:
        """These members, the best first."""
        scores = self._scores(self.true[part], None if self.probabilities is None
                              else self.probabilities[part], torch.ones(()))
        order = sorted(range(len(part)), key=lambda place: scores[place], reverse=True)
        return part[order]

    def next(self, counts: Tensor, part: Tensor) -> int:
        """Which of these members improves the mean most, or harms it least."""
        sums = counts.double()
        true = (sums @ self.true) + self.true[part]
        whole = None
        if self.probabilities is not None:
            whole = torch.tensordot(sums, self.probabilities, 1) + self.probabilities[part]
        scores = self._scores(true, whole, counts.sum() + 1)
        return int(part[max(range(len(part)), key=lambda place: scores[place])])

    def _scores(
        self, true: Tensor, whole: Tensor | None, total: Tensor
    ) -> list[tuple[float, float]]:
        """Of sums of probabilities, at the labels [K, N] and whole [K, N, C]."""
        nll = -(true / total).log().clamp(min=-1e9).mean(1)
        right = torch.zeros(len(true)) if whole is None else (
            whole.argmax(2) == self.labels).double().mean(1)
        return list(zip(right.tolist(), (-nll).tolist(), strict=True))
