"""TSV-Merge: Gargiulo et al. 2025, "Task singular vectors: reducing task interference in model
merging", arXiv:2412.00081."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.spectra import merged_matrices, polar, side_by_side, singular
from zoo.fusion.weights.task_arithmetic import wanted_base


def tsv_m(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    rank: float | None = None,
    scale: float = 1.0,
    split_qkv: bool = False,
) -> Tensor:
    """Keep each task's largest singular vectors, make those of all tasks orthogonal: θ₀ + λU⊥ΣV⊥ᵀ.

    Of each wᵢτᵢ, as a matrix (out, in · height · width), the largest singular values and vectors
    stay; put side by side, U and V are replaced by the nearest orthonormal matrices. One member
    gives itself back, and of copies of a member what is kept of it. Task vectors that are no
    matrices are averaged: biases, norms, depthwise kernels, embeddings; of a grouped convolution
    the groups' rows stand in one matrix.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Raises OptionError for a rank outside (0, 1].
    Gargiulo et al. 2025, arXiv:2412.00081; at least one vector per task is kept, where the authors'
    code would drop a small layer.

    Options:
        rank: fraction of a task's singular vectors that is kept, in (0, 1]; null for one over the
            number of members
        scale: λ on the merged task vector
        split_qkv: treat query, key and value of a fused attention weight as three matrices; off,
            as one, as in the paper's experiments
    """
    if rank is not None and not 0 < rank <= 1:
        raise OptionError("tsv_m", f"rank is {rank}, expected a fraction in (0, 1]")
    start = widened(wanted_base("tsv_m", base))
    vectors = [(widened(tensor) - start) * share
               for tensor, share in zip(tensors, weight, strict=True)]
    merged = merged_matrices(partial(_merge, rank=rank), vectors, key, split_qkv=split_qkv)
    return start.add(merged, alpha=scale)


def _merge(matrices: list[Tensor], rank: float | None) -> Tensor:
    """matrices: one per member, each [m, n]."""
    full = min(matrices[0].shape)
    kept = max(1, full // len(matrices) if rank is None else int(full * rank))
    left, values, right = side_by_side([singular(matrix, kept) for matrix in matrices])
    return (polar(left) * values) @ polar(right)
