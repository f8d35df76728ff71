"""Consensus merging with TALL masks: Wang et al. 2024, "Localizing task information for improved
model merging and compression", arXiv:2405.07813."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import summed, task_vectors


def consensus(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    agree: int = 2,
    strictness: float = 0.4,
    scale: float = 1.0,
) -> Tensor:
    """θ₀ + λmτ with τ = Σ wᵢτᵢ, and m = 1 where enough members find the entry important.

    Member i does where |τᵢ| > s·|τ − τᵢ|, its TALL mask: where the merged value is near its own.
    What only one member wants is dropped with what none does.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Raises OptionError for more members to agree than there are. Wang et al. 2024,
    arXiv:2405.07813, which chooses s for each task on validation.

    Options:
        agree: how many members must find an entry important; 0 keeps all
        strictness: s, the paper's λ of TALL masks, from 0.2 to 0.6 there; more masks more
        scale: λ on the sum
    """
    if not 0 <= agree <= len(tensors):
        raise OptionError("consensus", f"agree is {agree}, expected 0 to {len(tensors)} members")
    start = widened(wanted_base("consensus", base))
    total = summed("consensus", task_vectors(tensors, start), weight, key, normalise=False)
    votes = torch.zeros_like(total)
    for vector in task_vectors(tensors, start):
        off = (total - vector).abs_().mul_(strictness)
        votes.add_(torch.gt(vector.abs_(), off, out=off))
    return start.add(total.mul_(votes.ge_(agree)), alpha=scale)
