"""DARE: Yu et al. 2024, "Language models are super Mario: absorbing abilities from homologous
models as a free lunch", arXiv:2311.03099; here with task arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.masks import even_mask, in_steps
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    Changes,
    Convention,
    densities,
    for_members,
    l1_factors,
    l1_norms,
    task_vectors,
    with_sum,
)
from zoo.options import PerMember


def dare_linear(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    offset: int = 0,
    seed: int = 0,
    density: PerMember = 0.5,
    scale: float = 1.0,
    rescale: bool = True,
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool = False,
) -> Tensor:
    """Drop entries of each task vector at random, rescale the rest, and add: θ₀ + λ Σ wᵢτ̂ᵢ.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. measured:
    the sums of `measure` over the tensor; without them these entries are rescaled on their own.
    offset: of the first entry in the tensor. seed: with key, offset and the member's place it
    decides what is dropped, so the order of the members matters. Returns float32 [*shape]. Raises
    OptionError for a density outside (0, 1], or weights to divide by that sum to zero. Yu et al.
    2024, arXiv:2311.03099; mergekit makes up for what the mask took of the L1 norm instead.

    Options:
        density: probability of keeping an entry, the paper's 1 − p, in (0, 1]; in steps of 2⁻¹⁶;
            or one per member
        scale: λ on the sum
        rescale: make up for what was dropped
        convention: by 1/density ("paper"), or to the L1 norm that each tensor had ("mergekit")
        normalise: divide the sum by Σ wᵢ
    """
    start = widened(wanted_base("dare_linear", base))
    changes = dropped("dare_linear", tensors, start, measured, (seed, key), offset, density,
                      rescale, convention)
    return with_sum("dare_linear", changes, weight, key, normalise=normalise, scale=scale)


def dropped(
    strategy: str, tensors: Sequence[Tensor], start: Tensor, measured: Sequence[Tensor],
    stream: tuple[int, str], offset: int, density: PerMember, rescale: bool, convention: Convention,
) -> Changes:
    """The task vectors of DARE: each entry kept with a probability, and rescaled."""
    chances = _chances(densities(strategy, density, len(tensors), stream[1]), len(tensors))
    factors = [1 / chance if rescale else 1.0 for chance in chances]
    if rescale and convention == "mergekit" and min(chances) < 1:
        factors = l1_factors(measured[0] if measured else _norms(tensors, start, stream, offset,
                                                                 chances))
    return Changes(start, tensors, chances=chances, factors=factors, stream=stream, offset=offset)


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
    rescale: bool,
    convention: Convention,
) -> Tensor | None:
    """A slice's part in the L1 norms of each task vector, whole and masked: float64 [M, 2]."""
    if measured or not rescale or convention == "paper":
        return None
    chances = _chances(density, len(tensors))
    if min(chances) == 1:
        return None
    return _norms(tensors, widened(wanted_base("dare", base)), (seed, key), offset, chances)


def _norms(
    tensors: Sequence[Tensor], start: Tensor, stream: tuple[int, str], offset: int,
    chances: Sequence[float],
) -> Tensor:
    return l1_norms((vector, even_mask(chances[member], (*stream, member), offset, vector))
                    for member, vector in enumerate(task_vectors(tensors, start)))


def _chances(density: PerMember, members: int) -> list[float]:
    return [in_steps(each) for each in for_members(density, members)]
