"""Stacked generalisation by a multinomial logistic regression on the members' log-probabilities:
Wolpert 1992, "Stacked generalization", doi:10.1016/S0893-6080(05)80023-1; of class probabilities,
Ting and Witten 1999, "Issues in stacked generalization", arXiv:1105.5466."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.fusion.outputs.calibration import descend
from zoo.fusion.outputs.pool import Pool, mean_of_probabilities, spread

# Less likely than this counts as this, so that one sure error does not outweigh all.
_FLOOR = -30.0
# From strong to weak: each regression starts where the one before ended.
_PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


class Stacking(Pool):
    """softmax(Σᵢ wᵢ log pᵢ + b), mixed with the plain mean of the members' probabilities p.

    Each image is answered by regressions that were not fitted to it; by the likelihood of these
    answers the penalty on w and b is chosen (it pulls to equal weights and no bias), and the share
    of the regression in the mixture, which is none where the plain mean is better.

    members: M. num_classes: C. Takes logits [M, B, C] and gives log-probabilities [B, C]. What was
    fitted is in the state dict: `weights` [M, C] or [M, 1], `bias` [C], `share`, `fitted`. In
    float64 and without random numbers. Raises NotFitted when used before.

    Options:
        weights: one for each "member", or for each member and "class"
        folds: parts of the data of which each is answered without it, 2 or more
        l2: a penalty to use as it is, above 0; by default one of 10 to 0.001 is chosen
    """

    learns = True
    weights: Tensor
    bias: Tensor
    share: Tensor

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        weights: Literal["member", "class"] = "member",
        folds: int = 5,
        l2: float | None = None,
    ) -> None:
        super().__init__("stacking", members, num_classes)
        if weights not in ("member", "class"):
            raise OptionError("stacking", f"weights is {weights!r}, expected 'member' or 'class'")
        if folds < 2:
            raise OptionError("stacking", f"folds is {folds}, expected 2 or more")
        if l2 is not None and not l2 > 0:
            raise OptionError("stacking", f"l2 is {l2:g}, expected a penalty above 0")
        self.folds = folds
        self.penalties = _PENALTIES if l2 is None else (l2,)
        width = 1 if weights == "member" else num_classes
        self.register_buffer("weights", torch.full((members, width), 1 / members))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("share", torch.zeros(()))

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        likely = logits.log_softmax(2)
        stacked = _stacked(likely, self.weights.float(), self.bias.float())
        return _mixed(stacked, mean_of_probabilities(logits), self.share.float())

    def learn(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None
    ) -> Mapping[str, Any]:
        likely = logits.log_softmax(2)
        plain = mean_of_probabilities(logits)
        folds = min(self.folds, len(labels))
        part = spread(labels) % folds
        unseen = torch.empty(len(self.penalties), *plain.shape, dtype=torch.float64)
        for fold in range(folds) if folds > 1 else ():
            kept, out = part != fold, part == fold
            for number, found in enumerate(self._path(likely[:, kept], labels[kept])):
                unseen[number, out] = _stacked(likely[:, out], *found)
        losses = {
            (number, share): float(functional.nll_loss(
                _mixed(unseen[number], plain, torch.tensor(share)), labels))
            for number, share in product(range(len(self.penalties)), _SHARES)
        } if folds > 1 else {(0, 0.0): float(functional.nll_loss(plain, labels))}
        number, share = min(losses, key=lambda choice: (losses[choice], choice[1]))
        weights, bias = self._path(likely, labels)[number]
        with torch.no_grad():
            self.weights.copy_(weights)
            self.bias.copy_(bias)
            self.share.fill_(share)
        return {"l2": self.penalties[number], "share": share, "out_of_fold_nll":
                losses[number, share], "mean_nll": float(functional.nll_loss(plain, labels))}

    def _path(self, likely: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weights and bias for each penalty."""
        members, width = self.weights.shape
        equal = torch.full((members * width,), 1 / members, dtype=torch.float64)
        start = torch.cat([equal, torch.zeros(self.num_classes, dtype=torch.float64)])
        point, found = start, []
        for penalty in self.penalties:
            def loss(free: Tensor, penalty: float = penalty) -> Tensor:
                answer = _stacked(likely, *_parted(free, members, width))
                return (functional.nll_loss(answer, labels)
                        + penalty / 2 * (free - start).square().mean())

            point = descend(loss, point, steps=100)
            found.append(_parted(point, members, width))
        return found


def _parted(free: Tensor, members: int, width: int) -> tuple[Tensor, Tensor]:
    return free[:members * width].view(members, width), free[members * width:]


def _stacked(likely: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """likely: log-probabilities [M, B, C]. weights: [M, C] or [M, 1]. bias: [C]."""
    return ((likely.clamp(min=_FLOOR) * weights[:, None]).sum(0) + bias).log_softmax(1)


def _mixed(stacked: Tensor, plain: Tensor, share: Tensor) -> Tensor:
    return torch.logaddexp(stacked + share.log(), plain + (1 - share).log())
