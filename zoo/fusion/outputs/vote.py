"""Plurality voting: Lam and Suen 1997, "Application of majority voting to pattern recognition: an
analysis of its behavior and performance", doi:10.1109/3468.618255."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.fusion.outputs.exiting import Exiting
from zoo.fusion.outputs.pool import mean_of_probabilities, member_weights


class Vote(Exiting):
    """The share of the members that answer a class. A small vote more is split as their mean
    probabilities are: it breaks ties, and keeps every class possible.

    members: M. num_classes: C. known: which classes each member knows, bool [M, C]: it votes for
    one of them, and a class's share is that of those that know it. Takes logits [M, B, C] and gives
    log-probabilities [B, C].

    Options:
        weights: votes of each member, one number each; by default all have one
        smoothing: the small vote, in parts of the smallest, in (0, 1); it only breaks ties where
            all have one vote
        recalibrate: give the outcome a temperature, found on held-out data
        exit: leave the later members out for an image whose answer they cannot change ("exact"), or
            of which the first are sure ("confident"); "none" runs all
        confidence: for exit "confident", the share that is enough, in (0, 1]
    """

    votes: Tensor
    known: Tensor

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        known: Tensor | None = None,
        weights: list[float] | None = None,
        smoothing: float = 0.5,
        recalibrate: bool = False,
        exit: Literal["none", "exact", "confident"] = "none",
        confidence: float = 0.9,
    ) -> None:
        super().__init__("vote", members, num_classes, recalibrate=recalibrate, exit=exit,
                         confidence=confidence)
        if not 0 < smoothing < 1:
            raise OptionError("vote", f"smoothing is {smoothing:g}, expected a part in (0, 1)")
        votes = member_weights("vote", weights, members)
        if known is None:
            known = torch.ones(members, num_classes, dtype=torch.bool)
        self.register_buffer("votes", votes, persistent=False)
        self.register_buffer("known", known, persistent=False)
        smallest = float(votes[votes > 0].min())
        # Where not all members know all classes, shares may differ by less than one vote.
        self.small = smoothing * smallest / (1 if known.all() else members)

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        voters = (self.votes.float()[:, None] * self.known)[:len(logits)].sum(0)  # (C,)
        shares = self._counted(logits) / voters.clamp(min=1e-12)
        small = self.small / self.votes[:len(logits)].float().sum().clamp(min=1e-12)
        tail = mean_of_probabilities(logits) + small.log()
        return torch.logaddexp(shares.log(), tail).log_softmax(1)

    def lead(self, logits: Tensor) -> tuple[Tensor, float]:
        left = float(self.votes[len(logits):].sum())
        return self._counted(logits), left + self.small

    def _counted(self, logits: Tensor) -> Tensor:
        """The votes [B, C] of the first m members."""
        allowed = logits.masked_fill(~self.known[:len(logits), None], -torch.inf)
        ballots = functional.one_hot(allowed.argmax(2), self.num_classes)  # (m, B, C)
        return (ballots * self.votes.float()[:len(logits), None, None]).sum(0)
