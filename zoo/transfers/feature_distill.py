"""Train a network whose features hold those of several unlike teachers.

Ranzinger et al. 2024, "AM-RADIO: Agglomerative Vision Foundation Model", arXiv:2312.06709: an
adaptor per teacher. Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free
Multi-Teacher Distillation", arXiv:2410.01680: features of one scale, so that no teacher drowns
another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError
from zoo.model import Inner, Model
from zoo.transfers.distill import divergence, shares_of, soft_targets, want_mixture
from zoo.transfers.objective import Batch, Criterion, Norms, Objective, Taught, want_split


def feature_distill(
    model: Model,
    *,
    criterion: Criterion,
    teachers: Sequence[Model],
    alpha: float = 0.5,
    logits: float = 0.0,
    temperature: float = 4.0,
    weights: list[float] | None = None,
    hidden: int | None = None,
    norms: Norms = "auto",
) -> Objective:
    """Train any network so that an adaptor per teacher finds the teacher's features in its own:
    (1 - alpha) · criterion + alpha · Σ wₖ (1 - cosine + mean squared error), of teachers' features
    centred and divided by one number each. The adaptors are left behind.

    Options:
        alpha: weight of the teachers' features in [0, 1]; the labels have the rest, and with 1 the
            images need none
        logits: weight, 0 or more, of a third term: the divergence from the teachers' answers, as in
            distill; without it the teachers may have any classes
        temperature: T > 0 of that term
        weights: of the teachers, one number of 0 or more for each; by default all the same
        hidden: width of the adaptors; by default the larger of the two embeddings between which
            one stands
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    name = "zoo/feature_distill"
    want_mixture(name, teachers, temperature, alpha)
    if logits < 0:
        raise OptionError(name, f"the option 'logits' is {logits}, expected 0 or more")
    if hidden is not None and hidden < 1:
        raise OptionError(name, f"the option 'hidden' is {hidden}, expected 1 or more")
    if alpha < 1 or logits > 0:
        want_split(name, model)
    return Agglomeration(
        model, criterion, [teacher.dim for teacher in teachers], alpha=alpha, logits=logits,
        temperature=temperature, shares=shares_of(name, weights, len(teachers)), hidden=hidden,
        norms=norms)


class Agglomeration(Objective):
    """An adaptor and a standard per teacher, and up to three terms in the loss."""

    def __init__(
        self, model: Model, criterion: Criterion, dims: Sequence[int], *, alpha: float,
        logits: float, temperature: float, shares: Sequence[float], hidden: int | None,
        norms: Norms,
    ) -> None:
        super().__init__(model, criterion, norms=norms)
        self.alpha = alpha
        self.weight = logits
        self.temperature = temperature
        self.shares = tuple(shares)
        self.reads_logits = logits > 0
        self.standards = nn.ModuleList(Standard(dim) for dim in dims)
        self.adaptors = nn.ModuleList(adaptor(model.dim, dim, hidden) for dim in dims)

    def choose_trained(self) -> None:
        super().choose_trained()
        if self.alpha == 1 and not self.reads_logits:
            for parameter in _classifier(self.model):
                parameter.requires_grad_(False)

    def begin(self, taught: Iterable[Sequence[Taught]]) -> None:
        sums = [Moments() for _ in self.standards]
        for batch in taught:
            for moments, each in zip(sums, batch, strict=True):
                moments.add(each.embedding)
        for standard, moments in zip(self.standards, sums, strict=True):
            standard.set(moments)  # type: ignore[operator]

    def loss(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        embedding = self.model.embed(batch.images)  # (B, D)
        loss = embedding.new_zeros((), dtype=torch.float32)
        for share, standard, adapt, taught in zip(
                self.shares, self.standards, self.adaptors, batch.taught, strict=True):
            loss = loss + self.alpha * share * distance(
                adapt(embedding).float(), standard(taught.embedding))
        if self.alpha == 1 and not self.reads_logits:
            return loss
        logits = self.model.classify(embedding)  # (B, C)
        if self.alpha < 1:
            loss = loss + (1 - self.alpha) * self.criterion(logits, batch.labels)
        if self.reads_logits:
            wanted = soft_targets(batch, self.temperature, self.shares)
            loss = loss + self.weight * divergence(logits, wanted, self.temperature)
        return loss


def adaptor(dim: int, teacher: int, hidden: int | None) -> nn.Module:
    """From the student's features [B, dim] to a teacher's [B, teacher]."""
    width = hidden or max(dim, teacher)
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.GELU(),
                         nn.Linear(width, teacher))


def _classifier(model: Model) -> Iterator[nn.Parameter]:
    """The parameters that only logits depend on, and not the embedding."""
    if model.head is not None:
        yield from model.head.parameters()
        return
    for member in model.each_member():
        if isinstance(member, Inner):
            yield from _classifier(member.net)
        else:
            yield from member.head_parameters()


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine + squared error of standardised features [B, D], both means."""
    cosine = functional.cosine_similarity(found, wanted, dim=1).mean()
    return 1 - cosine + functional.mse_loss(found, wanted)


class Moments:
    """Sums over embeddings [B, D] that come in batches."""

    def __init__(self) -> None:
        self.n = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, embedding: Tensor) -> None:
        exact = embedding.double()
        self.n += len(exact)
        self.sum = self.sum + exact.sum(0)
        self.squares = self.squares + exact.square().sum(0)


class Standard(nn.Module):
    """Centres a teacher's features and divides them by one number, so that the mean variance of
    a dimension is 1. (PHI-S also turns them by a Hadamard matrix, which changes neither cosines nor
    distances.) A number per dimension would blow up units that hardly ever answer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.mean: Tensor
        self.scale: Tensor

    def set(self, moments: Moments) -> None:
        assert isinstance(moments.sum, Tensor)
        assert isinstance(moments.squares, Tensor)
        mean = moments.sum / moments.n
        variance = (moments.squares / moments.n - mean.square()).clamp(min=0).mean()
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt().clamp(min=1e-6))

    def forward(self, embedding: Tensor) -> Tensor:
        return (embedding.float() - self.mean) / self.scale
