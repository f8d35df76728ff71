"""DELLA: Deep et al. 2024, "DELLA-Merging: reducing interference in model merging through
magnitude-based sampling", arXiv:2406.11617; here with task arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion import compiled
from zoo.fusion.precision import widened
from zoo.fusion.randomness import keys_of
from zoo.fusion.weights.gram import rows
from zoo.fusion.weights.masks import mask
from zoo.fusion.weights.ranks import Ranks, ranked
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    Changes,
    Convention,
    densities,
    for_members,
    is_small,
    l1_factors,
    l1_norms,
    task_vectors,
    whose,
    with_sum,
)
from zoo.options import PerMember


def della_linear(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    offset: int = 0,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    density: PerMember = 0.5,
    epsilon: PerMember = 0.15,
    scale: float = 1.0,
    rescale: bool = True,
    ranks: Literal["exact", "binned"] = "exact",
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool = False,
) -> Tensor:
    """Drop entries at random, small ones more often, rescale, and add: θ₀ + λ Σ wᵢτ̂ᵢ.

    An entry is kept with a probability that rises with its rank by magnitude in its row, from
    density − ε to density + ε; in a row of one entry it is the density. The paper's ε is the whole
    width, 2ε here.

    tensors: one per member, each [*shape], or whole rows of a tensor of this shape, flat. base: θ₀.
    weight: w, one per member. measured: the sums of `measure` over the tensor; without them these
    entries are rescaled on their own. offset: of the first entry in the tensor. seed: with key,
    offset and the member's place it decides what is dropped, so the order of the members matters.
    Returns float32, shaped like the tensors. Raises OptionError for a density outside (0, 1], an
    epsilon that takes it to 0 or beyond 1, or weights to divide by that sum to zero. Deep et al.
    2024, arXiv:2406.11617; mergekit's rows run along axis 1 of a convolution's kernels, and it
    makes up for what the mask took of the L1 norm.

    Options:
        density: mean probability of keeping an entry, in (0, 1]; 1 keeps all, whatever epsilon is;
            or one per member
        epsilon: how much more or less likely the largest and the smallest entry of a row are kept;
            or one per member
        scale: λ on the sum
        rescale: make up for what was dropped
        ranks: "exact", or "binned": magnitudes within 6 % of each other share a rank; faster
        convention: rows are output channels, each kept entry is divided by its probability
            ("paper"); rows along axis 1, the L1 norm of each tensor is kept ("mergekit")
        normalise: divide the sum by Σ wᵢ
    """
    start = widened(wanted_base("della_linear", base))
    prune = MagPrune("della_linear", density, epsilon, rescale, ranks, convention, (seed, key),
                     offset, tuple(start.shape if shape is None else shape))
    changes = Changes(start, list(prune(tensors, start, measured)), ready=True)
    return with_sum("della_linear", changes, weight, key, normalise=normalise, scale=scale)


@dataclass(frozen=True, slots=True)
class MagPrune:
    """The pruning of DELLA. Fields: see `della_linear`; stream: seed and key."""

    strategy: str
    density: PerMember
    epsilon: PerMember
    rescale: bool
    ranks: Ranks
    convention: Convention
    stream: tuple[int, str]
    offset: int
    shape: tuple[int, ...]

    def __call__(
        self, tensors: Sequence[Tensor], start: Tensor, measured: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """The pruned task vectors."""
        spans = self.spans(len(tensors))
        self.check(spans)
        by_norm = self.rescale and self.convention == "mergekit" and not _keep_all(spans)
        factors = [1.0] * len(tensors)
        if by_norm:
            factors = l1_factors(measured[0] if measured else self.norms(tensors, start))
        for member, vector in enumerate(task_vectors(tensors, start)):
            if spans[member][0] < 1 and (by_norm or not self.prune_compiled(vector, member, spans)):
                chances = self.chances(vector, *spans[member])
                vector.mul_(mask(chances, (*self.stream, member), self.offset))
                if by_norm:
                    vector.mul_(factors[member])
                elif self.rescale:
                    vector.div_(chances)
            yield vector

    def prune_compiled(
        self, vector: Tensor, member: int, spans: Sequence[tuple[float, float]]
    ) -> bool:
        """Whether the kernels could prune a task vector in place, by its exact ranks."""
        width = vector.numel() // max(rows(vector, self.shape).shape[0], 1)
        kernels = compiled.kernels(vector)
        if kernels is None or self.ranks != "exact" or width < 2 or (
                self.convention == "mergekit" and len(self.shape) > 2):
            return False
        density, epsilon = spans[member]
        order = np.empty((vector.numel() // width, width), np.int64)
        kernels.magnitude_keys(vector.data_ptr(), order)
        order.sort(axis=1)
        kernels.prune(vector.data_ptr(), order, np.float32(2 * epsilon),
                      np.float32(density - epsilon), keys_of((*self.stream, member)), self.offset,
                      self.rescale)
        return True

    def norms(self, tensors: Sequence[Tensor], start: Tensor) -> Tensor:
        """The L1 norms of the task vectors, whole and masked: float64 [M, 2]."""
        spans = self.spans(len(tensors))
        return l1_norms(
            (vector, torch.ones_like(vector) if spans[member][0] == 1 else
             mask(self.chances(vector, *spans[member]), (*self.stream, member), self.offset))
            for member, vector in enumerate(task_vectors(tensors, start)))

    def spans(self, members: int) -> list[tuple[float, float]]:
        """Density and epsilon of each member."""
        return list(zip(for_members(self.density, members), for_members(self.epsilon, members),
                        strict=True))

    def check(self, spans: Sequence[tuple[float, float]]) -> None:
        """Raises OptionError for densities and epsilons that do not fit."""
        key = self.stream[1]
        densities(self.strategy, self.density, len(spans), key)
        for member, (density, epsilon) in enumerate(spans):
            if density < 1 and not abs(epsilon) < density <= 1 - abs(epsilon):
                raise OptionError(
                    self.strategy, f"density ± epsilon is {density} ± {epsilon}"
                    f"{whose(spans, member, key)}, expected both ends in (0, 1]")

    def chances(self, vector: Tensor, density: float, epsilon: float) -> Tensor:
        """The probability of keeping each entry, shaped like the vector."""
        magnitudes = vector.abs().float()
        if self.convention == "mergekit" and len(self.shape) > 2:
            # [outputs, inputs, taps] → a row for each output and tap
            kernels = rows(magnitudes, self.shape).reshape(-1, self.shape[1],
                                                           _taps(self.shape)).transpose(1, 2)
            ranks = ranked(kernels.reshape(-1, self.shape[1]), self.ranks)
            ranks = ranks.reshape(kernels.shape).transpose(1, 2)
        else:
            ranks = ranked(rows(magnitudes, self.shape), self.ranks)
        chances = ranks.mul(2 * epsilon).add_(density - epsilon)
        return chances.reshape(vector.shape).to(vector.dtype)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    measured: Sequence[Tensor],
    shape: Sequence[int],
    offset: int,
    seed: int,
    density: PerMember,
    epsilon: PerMember,
    rescale: bool,
    ranks: Ranks,
    convention: Convention,
) -> Tensor | None:
    """Some rows' part in the L1 norms of each task vector, whole and masked: float64 [M, 2]."""
    if measured or not rescale or convention == "paper" or is_small(tensors[0], shape):
        return None
    start = widened(wanted_base("della", base))
    prune = MagPrune("della", density, epsilon, rescale, ranks, convention, (seed, key), offset,
                     tuple(shape))
    return None if _keep_all(prune.spans(len(tensors))) else prune.norms(tensors, start)


def _keep_all(spans: Sequence[tuple[float, float]]) -> bool:
    """Whether nothing is dropped. spans: density and epsilon of each member."""
    return all(density == 1 for density, _ in spans)


def _taps(shape: Sequence[int]) -> int:
    return max(torch.Size(shape[2:]).numel(), 1)
