"""Multi-SLERP: Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.fusion.weights.gram import gram, lengths, proportions, weighted_sum


def multislerp(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    normalise: bool = True,
) -> Tensor:
    """The mean direction Σ wᵢuᵢ of the unit vectors uᵢ = xᵢ / ‖xᵢ‖, at the mean length Σ wᵢ‖xᵢ‖.

    The published method also takes one step in the tangent space at that direction; the step is
    zero, because the parts of Σ wᵢuᵢ across its own direction cancel. x are the tensors, or with a
    base their task vectors. Where Σ wᵢuᵢ is zero, the result is Σ wᵢxᵢ.

    tensors: one per member, each [*shape]. base: θ₀ [*shape] or None. weight: w. measured: the
    Gram matrix of the tensor, (float64 [M, M],); without it, that of these entries is taken.
    Returns float32 [*shape]. Raises OptionError when the weights to divide by sum to zero. Goddard
    2025, mergekit.

    Options:
        normalise: divide the weights by their sum
    """
    known = measured[0] if measured else gram(tensors, base)
    shares = (proportions("multislerp", weight, key, known) if normalise
              else torch.tensor(weight, dtype=torch.float64, device=known.device))
    return weighted_sum(tensors, mean_direction(known, shares), base)


def mean_direction(known: Tensor, shares: Tensor) -> Tensor:
    """The coefficients of the mean direction at the mean length. known: [M, M]; shares: [M]."""
    length = lengths(known)
    units = torch.where(length > 0, shares / length, 0)
    reached = (units @ known @ units).clamp_min(0).sqrt()
    if reached < 1e-7:
        return shares
    return units * (shares @ length / reached)
