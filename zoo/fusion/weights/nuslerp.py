"""NuSLERP: Goddard 2024, in mergekit (Goddard et al. 2024, arXiv:2403.13257)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.weights.gram import (
    columns,
    gram,
    gram_of_rows,
    proportions,
    rows,
    weighted_sum,
)
from zoo.fusion.weights.slerp import PARALLEL, arc


def nuslerp(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
    over: Literal["tensor", "rows", "columns"] = "tensor",
) -> Tensor:
    """Slerp at t = w₂ / (w₁ + w₂), of the task vectors where there is a base.

    tensors: the two members', each [*shape]. base: θ₀ [*shape] or None. weight: w. measured: the
    Gram matrix of the tensor, (float64 [2, 2],), or of its columns; without it, that of these
    entries is taken. shape: the whole tensor's. Vectors that are parallel or opposite, and those of
    length zero, are interpolated straight. Returns float32 [*shape]. Raises OptionError when the
    weights sum to zero. Goddard 2024, mergekit, whose `nuslerp_row_wise` means columns; its rows
    run along the last axis, in convolutions too.

    Options:
        over: what is one vector: the whole "tensor", each of its "rows" (output channels), or each
            of its "columns", which run along the first axis
    """
    if over == "rows":
        start = None if base is None else rows(base, shape)
        matrices = [rows(tensor, shape) for tensor in tensors]
        known = gram_of_rows(matrices, start)
    elif over == "columns":
        start = None if base is None else columns(base, shape)
        matrices = [columns(tensor, shape) for tensor in tensors]
        known = measured[0] if measured else gram_of_rows(matrices, start)
    else:
        start, matrices = base, list(tensors)
        known = measured[0] if measured else gram(tensors, base)
    place = proportions("nuslerp", weight, key, known)[1].item()
    merged = weighted_sum(matrices, arc(known, place, PARALLEL), start)
    if over == "columns":
        merged = merged.mT
    return merged.reshape(tensors[0].shape)
