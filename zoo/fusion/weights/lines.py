"""LiNeS: Wang et al. 2024, "LiNeS: post-training layer scaling prevents forgetting and enhances
model merging", arXiv:2410.17146."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import summed, task_vectors


def lines(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    depth: float = 1.0,
    alpha: float | None = None,
    beta: float | None = None,
) -> Tensor:
    """θ₀ + (α + βd) Σ wᵢτᵢ: shallow layers, which serve all tasks, move less than deep ones.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. depth: d
    of the tensor's layer, 0 at the input to 1 at the output. Returns float32 [*shape]. Wang et al.
    2024, arXiv:2410.17146, which has α = 1/k times the ratio of norms of Σ τᵢ and of the merged
    vector, one here, and searches β; its code scales what stands outside of the blocks by α.

    Options:
        alpha: factor at the input; null is 1/k for k members
        beta: what the output has more; null is 1 − alpha
    """
    start = widened(wanted_base("lines", base))
    first = 1 / len(tensors) if alpha is None else alpha
    rise = 1 - first if beta is None else beta
    total = summed("lines", task_vectors(tensors, start), weight, key, normalise=False)
    return start.add(total, alpha=first + rise * depth)
