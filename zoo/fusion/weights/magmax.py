"""MagMax: Marczak et al. 2024, "MagMax: leveraging model merging for seamless continual learning",
arXiv:2407.06322."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import task_vectors


def magmax(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    scale: float = 1.0,
) -> Tensor:
    """θ₀ + λτ, where each entry of τ is the wᵢτᵢ of the largest magnitude; + wins a draw.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Marczak et al. 2024, arXiv:2407.06322.

    Options:
        scale: λ on the chosen changes
    """
    start = widened(wanted_base("magmax", base))
    highest: Tensor | None = None
    for vector, share in zip(task_vectors(tensors, start), weight, strict=True):
        vector.mul_(share)
        if highest is None:
            highest, lowest = vector, vector.clone()
        else:
            torch.maximum(highest, vector, out=highest)
            torch.minimum(lowest, vector, out=lowest)
    assert highest is not None
    wins = (highest + lowest).ge_(0)
    return start.add(torch.lerp(lowest, highest, wins), alpha=scale)
