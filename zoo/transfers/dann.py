"""Features that a discriminator cannot tell apart by domain.

Ganin et al. 2016, "Domain-Adversarial Training of Neural Networks", JMLR 17(59),
arXiv:1505.07818.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms, Objective, want_split


def dann(
    model: Model,
    *,
    criterion: Criterion,
    strength: float = 1.0,
    hidden: int = 256,
    domains: Literal["concatenated", "separate"] = "concatenated",
    norms: Norms = "train",
) -> Objective:
    """Classify the labelled source while a domain discriminator behind a gradient reversal pulls
    the features of source and unlabelled target together.

    Options:
        strength: the reversal's final weight λ, 0 or more; it grows from 0 as
            2 / (1 + exp(-10 p)) - 1 over the whole training, p being the progress; 0 trains on the
            source alone
        hidden: width of the discriminator's two hidden layers, 1 or more
        domains: one forward of both domains (batch norm sees the mixture), or one each; with
            separate ones the running statistics are the target's
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    if strength < 0 or hidden < 1:
        raise OptionError("zoo/dann", f"strength is {strength} and hidden {hidden}, expected "
                          "strength 0 or more and hidden 1 or more")
    want_split("zoo/dann", model)
    return DomainAdversarial(
        model, criterion, strength=strength, hidden=hidden, domains=domains, norms=norms
    )


class DomainAdversarial(Objective):
    needs_images = True

    def __init__(
        self, model: Model, criterion: Criterion, *, strength: float, hidden: int, domains: str,
        norms: Norms,
    ) -> None:
        super().__init__(model, criterion, norms=norms)
        self.strength = strength
        self.domains = domains
        self.discriminator = nn.Sequential(
            nn.Linear(model.dim, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def loss(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        assert batch.unlabelled is not None
        source, target = self._embed(batch.images, batch.unlabelled)  # (B, D), (B', D)
        classification = self.criterion(self.model.classify(source), batch.labels)
        weight = self.strength * (2 / (1 + math.exp(-10 * batch.progress)) - 1)
        both = reverse_gradient(torch.cat([source, target]), weight)
        domain = torch.cat([both.new_ones(len(source)), both.new_zeros(len(target))])
        confusion = functional.binary_cross_entropy_with_logits(
            self.discriminator(both).squeeze(1), domain
        )
        return classification + confusion

    def _embed(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if self.domains == "separate":
            with _statistics_kept(self.model):
                embedded = self.model.embed(source)
            return embedded, self.model.embed(target)
        side = self.model.image_size
        if source.shape[1:] != target.shape[1:]:
            source, target = (_as_square(images, side) for images in (source, target))
        embedded = self.model.embed(torch.cat([source, target]))
        return embedded[: len(source)], embedded[len(source):]


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradients[0], None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """The same values; the gradient comes back times -weight."""
    return _Reversal.apply(x, weight)  # type: ignore[no-any-return]


def _as_square(images: Tensor, side: int) -> Tensor:
    """Two domains of different sizes or channels in one batch."""
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    return functional.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


class _statistics_kept:
    """Batch norm normalises by the batch, and its running statistics stay as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules()
                      if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.track_running_stats = False

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.track_running_stats = True
