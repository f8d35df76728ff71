"""Update a network from the fused model that it is a part of.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms, Objective


def self_distill(
    model: Model,
    *,
    criterion: Criterion,
    teachers: Sequence[Model],
    temperature: float = 4.0,
    alpha: float = 0.7,
    norms: Norms = "auto",
) -> Objective:
    """Train the model on the labels and on the teachers' softened probabilities.

    Options:
        temperature: T > 0, which softens teachers and student alike; the term is scaled by T²
        alpha: weight of the teachers' term in [0, 1]; the labels have the rest
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    if not teachers:
        raise OptionError("zoo/self_distill", "there is no teacher; pass teachers=[fused_model]")
    if temperature <= 0 or not 0 <= alpha <= 1:
        raise OptionError("zoo/self_distill", f"temperature is {temperature} and alpha {alpha}, "
                          "expected temperature > 0 and alpha in [0, 1]")
    return SelfDistillation(model, criterion, temperature=temperature, alpha=alpha, norms=norms)


class SelfDistillation(Objective):
    def __init__(
        self, model: Model, criterion: Criterion, *, temperature: float, alpha: float, norms: Norms
    ) -> None:
        super().__init__(model, criterion, norms=norms)
        self.temperature = temperature
        self.alpha = alpha

    def loss(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)  # (B, C)
        t = self.temperature
        softened = [functional.softmax(taught.logits / t, 1) for taught in batch.taught]
        wanted = torch.stack(softened).mean(0)  # (B, C)
        taught = functional.kl_div(functional.log_softmax(logits / t, 1), wanted,
                                   reduction="batchmean")
        labels = self.criterion(logits, batch.labels)
        return (1 - self.alpha) * labels + self.alpha * t * t * taught
