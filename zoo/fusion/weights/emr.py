"""EMR-Merging: Huang et al. 2024, "EMR-Merging: tuning-free high-performance model merging",
arXiv:2405.17461."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base


def emr(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    task: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Elect one task vector for all members, and mask and rescale it for one: θ₀ + λᵢ Mᵢ ∘ τ.

    τ has the sign of Σ wᵢτᵢ and the largest magnitude among the members of that sign. A member's
    mask keeps the entries in which it agrees with τ, and its scale gives them the mean magnitude of
    its own. The paper keeps τ with all masks and scales and applies one of them for each task; a
    fusion of weights is one network, so `task` says whose it is, and without it the network is
    θ₀ + τ, which the paper only starts from.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. measured:
    the sums of `measure` over the model; without them these entries alone make the scale. Returns
    float32 [*shape]. Raises OptionError for a task that is no member.
    Huang et al. 2024, arXiv:2405.17461.

    Options:
        task: the member whose mask and scale are applied, from 1; null for none
        scale: λ on the task vector, after the member's own scale
    """
    vectors = _vectors(tensors, base, weight, task)
    elected = _elected(vectors)
    if task is not None:
        sums = measured[0] if measured else _magnitudes(vectors, elected, task)
        elected = elected * (vectors[task - 1] * elected > 0)
        scale *= float(sums[0] / sums[1]) if sums[1] > 0 else 0.0
    return widened(wanted_base("emr", base)).add(elected, alpha=scale)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    weight: Sequence[float],
    measured: Sequence[Tensor],
    task: int | None,
) -> Tensor | None:
    """A slice's part in Σ|τᵢ| and Σ|Mᵢ ∘ τ| of the chosen member, float64 [2]."""
    if task is None or measured:
        return None
    vectors = _vectors(tensors, base, weight, task)
    return _magnitudes(vectors, _elected(vectors), task)


def _vectors(
    tensors: Sequence[Tensor], base: Tensor | None, weight: Sequence[float], task: int | None
) -> list[Tensor]:
    if task is not None and not 1 <= task <= len(tensors):
        raise OptionError("emr", f"task is {task}, expected a member from 1 to {len(tensors)}")
    start = widened(wanted_base("emr", base))
    return [(widened(tensor) - start) * share
            for tensor, share in zip(tensors, weight, strict=True)]


def _elected(vectors: Sequence[Tensor]) -> Tensor:
    sign = torch.where(sum(vectors[1:], vectors[0]) > 0, 1.0, -1.0).to(vectors[0].dtype)
    largest = torch.zeros_like(sign)
    for vector in vectors:
        largest = torch.maximum(largest, vector * sign)
    return largest * sign


def _magnitudes(vectors: Sequence[Tensor], elected: Tensor, task: int) -> Tensor:
    own = vectors[task - 1]
    kept = elected * (own * elected > 0)
    return torch.stack([part.abs().sum().cpu().double() for part in (own, kept)])
