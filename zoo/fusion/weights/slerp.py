"""Spherical linear interpolation: Shoemake 1985, "Animating rotation with quaternion curves"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.fusion.weights.gram import gram, lengths, proportions, weighted_sum

# Closer to parallel, the arc is a straight line in float32.
PARALLEL = 1 - 1e-7


def slerp(
    tensors: Sequence[Tensor],
    *,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    t: float = 0.5,
    convention: Literal["paper", "mergekit"] = "paper",
) -> Tensor:
    """(sin((1−t)φ) θ₁ + sin(tφ) θ₂) / sin φ, where φ is the angle between the two tensors.

    Each tensor is one vector, with its own angle; lengths are not made equal first. Vectors that
    are almost parallel or opposite, and those of length zero, are interpolated straight.

    tensors: the two members', each [*shape]. weight: w; the place is t·w₂ / ((1−t)·w₁ + t·w₂), so
    that weights by layer move it. measured: the Gram matrix of the tensor, (float64 [2, 2],);
    without it, that of these entries is taken. Returns float32 [*shape]. Raises OptionError when
    the weighted (1−t) and t sum to zero. Shoemake 1985 (quaternions); mergekit goes straight from
    |cos φ| = 0.9995 on, which fine-tunes of one model pass.

    Options:
        t: place on the arc, 0 is the first member, 1 the second
        convention: straight only where the arc is ("paper"), or if |cos φ| > 0.9995 ("mergekit")
    """
    known = measured[0] if measured else gram(tensors, None)
    if weight[0] == weight[1]:
        place = t
    else:
        shares = [(1 - t) * weight[0], t * weight[1]]
        place = proportions("slerp", shares, key, known)[1].item()
    parallel = 0.9995 if convention == "mergekit" else PARALLEL
    return weighted_sum(tensors, arc(known, place, parallel))


def arc(known: Tensor, place: float, parallel: float) -> Tensor:
    """The two coefficients of slerp. known: Gram matrices [..., 2, 2]. Returns [..., 2]."""
    product = lengths(known).prod(-1)
    cosine = (known[..., 0, 1] / product).clamp(-1, 1)
    straight = ~(cosine.abs() <= parallel)  # and where the product is zero, cosine is NaN
    angle = torch.acos(torch.where(straight, 0, cosine))
    sine = angle.sin()
    return torch.stack([
        torch.where(straight, 1 - place, ((1 - place) * angle).sin() / sine),
        torch.where(straight, place, (place * angle).sin() / sine)], -1)
