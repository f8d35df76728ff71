"""A weighted mean of calibrated members: temperatures as in Guo et al. 2017, "On calibration of
modern neural networks", arXiv:1706.04599, weights on the simplex, both by the likelihood of
held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.outputs.calibration import at_labels, bounded, descend, log_likelihood
from zoo.fusion.outputs.pool import Pool


class Weighted(Pool):
    """Σᵢ wᵢ softmax(zᵢ / Tᵢ): one temperature and one weight per member, fitted by NLL.

    members: M. num_classes: C. Takes logits z [M, B, C] and gives log-probabilities [B, C], in
    float32. What was fitted is in the state dict: `temperatures` [M], `weights` [M] on the
    simplex, `fitted`. On the data it was fitted to, the NLL is never above that of the uniform mean
    or of the best member, calibrated or not. Raises NotFitted when used before.

    Options:
        recalibrate: give the mean a temperature too, found on the same data
    """

    learns = True
    weights: Tensor

    def __init__(self, members: int, num_classes: int, *, recalibrate: bool = False) -> None:
        super().__init__("weighted", members, num_classes, recalibrate=recalibrate)
        self.register_buffer("temperatures", torch.ones(members))
        self.register_buffer("weights", torch.full((members,), 1 / members))

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        scaled = (logits / self.temperatures.float()[:, None, None]).log_softmax(2)
        shares = self.weights.float().log().log_softmax(0)
        return (scaled + shares[:, None, None]).logsumexp(0)  # (B, C)

    def learn(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None
    ) -> Mapping[str, Any]:
        """Find the temperatures and weights that make the labels likely, in float64 and without
        random numbers."""
        temperatures, weights = _best(logits, at_labels(logits, labels))
        with torch.no_grad():
            self.temperatures.copy_(temperatures)
            self.weights.copy_(weights)
        return {"temperatures": temperatures.tolist(), "weights": weights.tolist()}


def _best(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest temperatures and weights [M] of: the uniform mean and each member alone,
    calibrated or not, and what a descent from the calibrated uniform mean finds."""
    members = len(logits)
    even = torch.zeros(members, dtype=torch.float64)
    calibrated = descend(lambda t: -log_likelihood(logits, true, bounded(t)).mean(1).sum(), even)
    joint = descend(
        lambda both: _nll(logits, true, bounded(both[0]), both[1].softmax(0)),
        torch.stack([calibrated, even]),
    )
    candidates = [
        (temperatures, weights)
        for temperatures in (torch.ones(members), bounded(calibrated).float())
        for weights in (torch.full((members,), 1 / members), *torch.eye(members))
    ]
    candidates.append((bounded(joint[0]).float(), joint[1].softmax(0).float()))
    return min(candidates, key=lambda found: float(
        _nll(logits, true, found[0].double(), found[1].double())))


def _nll(logits: Tensor, true: Tensor, temperatures: Tensor, weights: Tensor) -> Tensor:
    likelihood = log_likelihood(logits, true, temperatures)
    return -(likelihood + weights.log()[:, None]).logsumexp(0).mean()
