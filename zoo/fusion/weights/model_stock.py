"""Model Stock: Jang et al. 2024, "Model Stock: all we need is just a few fine-tuned models",
arXiv:2403.19522."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.fusion.weights.gram import (
    gram,
    gram_of_rows,
    lengths,
    proportions,
    rows,
    weighted_sum,
)
from zoo.fusion.weights.task_arithmetic import wanted_base


def model_stock(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
    over: Literal["tensor", "rows"] = "tensor",
    convention: Literal["paper", "mergekit"] = "paper",
) -> Tensor:
    """tθ̄ + (1−t)θ₀ with t = k·cos φ / ((k−1)·cos φ + 1), φ the angle between task vectors.

    cos φ is the mean over all pairs of the k members, where a task vector of zero has the cosine
    0. Where the divisor is zero, t is 0.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: those of the mean θ̄.
    measured: the Gram matrix of the tensor's task vectors, (float64 [k, k],); without it, that of
    these entries is taken. shape: the whole tensor's. Returns float32 [*shape]. Raises OptionError
    when the weights sum to zero. Jang et al. 2024, arXiv:2403.19522; mergekit has no weights, and
    its floor under the norms bends small task vectors to the base.

    Options:
        over: where there is an angle of its own: the whole "tensor" or each row (output channel)
        convention: the true cosine ("paper"), or ⟨τᵢ, τⱼ⟩ over at least 1e-6 ("mergekit")
    """
    start = wanted_base("model_stock", base)
    if over == "rows":
        start = rows(start, shape)
        matrices = [rows(tensor, shape) for tensor in tensors]
        known = gram_of_rows(matrices, start)
    else:
        matrices = list(tensors)
        known = measured[0] if measured else gram(tensors, start)
    shares = proportions("model_stock", weight, key, known)
    ratio = interpolation(known, 1e-6 if convention == "mergekit" else 0)[..., None]
    merged = weighted_sum([*matrices, start], torch.cat([ratio * shares, 1 - ratio], -1))
    return merged.reshape(tensors[0].shape)


def interpolation(known: Tensor, floor: float) -> Tensor:
    """t of Gram matrices [..., k, k]: [...]."""
    members = known.shape[-1]
    length = lengths(known)
    products = (length[..., None] * length[..., None, :]).clamp_min(floor)
    cosines = torch.where(products > 0, known / products, 0).clamp(-1, 1)
    one, other = torch.triu_indices(members, members, 1, device=known.device)
    cosine = cosines[..., one, other].mean(-1)
    divisor = 1 + (members - 1) * cosine
    return torch.where(divisor.abs() < 1e-6, 0, members * cosine / divisor)
