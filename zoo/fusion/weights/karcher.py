"""The Karcher mean on the sphere: Wang et al. 2026, "Functionality-oriented LLM merging on the
Fisher–Rao manifold", arXiv:2603.04972."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.weights.gram import gram, lengths, proportions, weighted_sum


def karcher(
    tensors: Sequence[Tensor],
    *,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    max_iter: int = 10,
    tol: float = 1e-5,
) -> Tensor:
    """The point of the sphere with the least Σ wᵢφᵢ², φᵢ the angle to member i, at the mean length.

    It starts at the mean direction and follows the mean of the members' logarithms, which lie in
    their span, so that only coefficients move. Where the mean direction is not defined, as for
    opposite members, and where all are zero, the result is the straight mean Σ wᵢθᵢ.

    tensors: one per member, each [*shape]. weight: w, divided by its sum. measured: the Gram
    matrix of the tensor, (float64 [M, M],); without it, that of these entries is taken. Returns
    float32 [*shape]. Raises OptionError when the weights sum to zero. Wang et al. 2026,
    arXiv:2603.04972, as in mergekit, which has no weights.

    Options:
        max_iter: steps at most
        tol: stop when a step is no longer than this angle, in radians
    """
    if max_iter < 0 or tol < 0:
        raise OptionError("karcher", f"max_iter is {max_iter} and tol is {tol}, expected 0 or more")
    known = measured[0] if measured else gram(tensors, None)
    shares = proportions("karcher", weight, key, known)
    return weighted_sum(tensors, karcher_mean(known, shares, max_iter, tol))


def karcher_mean(known: Tensor, shares: Tensor, max_iter: int, tol: float) -> Tensor:
    """The coefficients of the Karcher mean. known: Gram matrix [M, M]. shares: [M], of sum 1."""
    length = lengths(known)
    units = torch.where(length > 0, 1 / length, 0)
    cosines = known * units * units[:, None]  # the Gram matrix of the unit vectors
    pull = shares * (length > 0)
    mean = pull.clone()
    size = _norm(mean, cosines)
    if size < 1e-7:
        return shares
    mean /= size
    pull /= pull.sum()
    for _ in range(max_iter):
        cosine = (cosines @ mean).clamp(-1, 1)
        angle = cosine.acos()
        # From the opposite point no direction is the shortest.
        there = (angle <= tol) | (cosine < -1 + 1e-6)
        strength = torch.where(there, 0, pull * angle / angle.sin())
        step = strength - (strength @ cosine) * mean
        size = _norm(step, cosines)
        if size <= tol:
            break
        mean = size.cos() * mean + size.sin() / size * step
        mean /= _norm(mean, cosines)
    return mean * units * (shares @ length)


def _norm(coefficients: Tensor, known: Tensor) -> Tensor:
    return (coefficients @ known @ coefficients).clamp_min(0).sqrt()
