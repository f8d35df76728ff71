"""Train a network on what other networks answer.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. Teachers
weighted by image: Zhang et al. 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation",
arXiv:2201.00007; its term on answers, without the one on features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms, Objective, Taught


def distill(
    model: Model,
    *,
    criterion: Criterion,
    teachers: Sequence[Model],
    temperature: float = 4.0,
    alpha: float = 0.9,
    weights: Literal["uniform", "confidence"] | list[float] = "uniform",
    norms: Norms = "auto",
) -> Objective:
    """Train any network on the softened answers of one teacher or several, and on the labels:
    (1 - alpha) · criterion + alpha · T² · KL(teachers ‖ student), of probabilities softened by T.

    Options:
        temperature: T > 0, which softens teachers and student alike; the term is scaled by T²
        alpha: weight of the teachers' term in [0, 1]; the labels have the rest, and with 1 the
            images need none
        weights: of the teachers in the mean of their probabilities: uniform, one number of 0 or
            more for each, or confidence: the surer a teacher is of an image's label, the more
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    want_mixture("zoo/distill", teachers, temperature, alpha)
    shares = None
    if weights != "confidence":
        given = None if isinstance(weights, str) else weights
        shares = shares_of("zoo/distill", given, len(teachers))
    return Distillation(model, criterion, temperature=temperature, alpha=alpha, shares=shares,
                        norms=norms)


class Distillation(Objective):
    """The criterion on the labels and the divergence from the teachers.

    shares: one per teacher, with sum 1, or None: each image's own, by the teachers' confidence.
    """

    def __init__(
        self, model: Model, criterion: Criterion, *, temperature: float, alpha: float,
        shares: Sequence[float] | None, norms: Norms,
    ) -> None:
        super().__init__(model, criterion, norms=norms)
        self.temperature = temperature
        self.alpha = alpha
        self.shares = shares

    def loss(self, batch: Batch) -> Tensor:
        logits = self.logits(batch)  # (B, C)
        wanted = soft_targets(batch, self.temperature, self.shares)
        loss = self.alpha * divergence(logits, wanted, self.temperature)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * self.criterion(logits, batch.labels)
        return loss


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T² · KL(wanted ‖ student), mean over the batch; wanted: probabilities [B, C] at temperature
    T. The factor keeps the gradient as large as it is at T = 1, whatever T is."""
    answered = functional.log_softmax(logits.float() / temperature, 1)
    return temperature**2 * functional.kl_div(answered, wanted, reduction="batchmean")


def soft_targets(batch: Batch, temperature: float, shares: Sequence[float] | None) -> Tensor:
    """The teachers' probabilities [B, C] at this temperature, averaged by their shares.

    Log-probabilities, which a fusion of outputs gives, are logits of the same probabilities.
    """
    softened = torch.stack([functional.softmax(taught.logits.float() / temperature, 1)
                            for taught in batch.taught])  # (K, B, C)
    if shares is None:
        each = confidence(batch.taught, batch.labels)  # (K, B)
    else:
        each = softened.new_tensor(list(shares))[:, None]  # (K, 1)
    return (each[:, :, None] * softened).sum(0)


def confidence(taught: Sequence[Taught], labels: Tensor) -> Tensor:
    """Each teacher's share of each image [K, B], from its cross-entropy L on the label, of its
    probabilities at temperature 1: (1 - exp(Lₖ) / Σ exp(Lⱼ)) / (K - 1). Raises OptionError
    without labels."""
    if bool((labels < 0).any()):
        raise OptionError("zoo/distill", "the option 'weights' is 'confidence', which is measured "
                          "on labels, and the images have none; expected 'uniform' or numbers")
    losses = torch.stack([functional.cross_entropy(each.logits.float(), labels, reduction="none")
                          for each in taught])  # (K, B)
    if len(taught) == 1:
        return torch.ones_like(losses)
    return (1 - losses.softmax(0)) / (len(taught) - 1)


def shares_of(
    method: str, weights: Sequence[float] | None, teachers: int
) -> tuple[float, ...]:
    """The teachers' shares, which sum to 1: all the same for None. Raises OptionError."""
    given = [1.0] * teachers if weights is None else weights
    if len(given) != teachers or min(given) < 0 or sum(given) == 0:
        raise OptionError(method, f"the option 'weights' is {weights!r}, expected one number for "
                          f"each of the {teachers} teachers, 0 or more and one of them above")
    return tuple(each / sum(given) for each in given)


def want_mixture(
    method: str, teachers: Sequence[Model], temperature: float, alpha: float
) -> None:
    """Raise OptionError without teachers, or for numbers that cannot be."""
    if not teachers:
        raise OptionError(method, "there is no teacher; pass teachers=[fused_model]")
    if temperature <= 0 or not 0 <= alpha <= 1:
        raise OptionError(method, f"temperature is {temperature} and alpha {alpha}, "
                          "expected temperature > 0 and alpha in [0, 1]")
