"""Iso-C: Marczak et al. 2025, "No task left behind: isotropic model merging with common and
task-specific subspaces", arXiv:2502.04959."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.spectra import merged_matrices, singular
from zoo.fusion.weights.task_arithmetic import wanted_base


def iso_c(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    scale: float = 1.0,
    split_qkv: bool = False,
) -> Tensor:
    """Sum the task vectors and make all singular values of the sum their mean: θ₀ + λ s̄ UVᵀ.

    USVᵀ = Σ wᵢτᵢ as a matrix (out, in · height · width). Only singular values that are not zero
    count, in the mean and in the result. Task vectors that are no matrices are averaged: biases,
    norms, depthwise kernels, embeddings; of a grouped convolution the groups' rows stand in one
    matrix.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Marczak et al. 2025, arXiv:2502.04959.

    Options:
        scale: λ on the merged task vector; the paper chooses it on validation data
        split_qkv: treat query, key and value of a fused attention weight as three matrices; off,
            as one, as in the paper's experiments
    """
    start = widened(wanted_base("iso_c", base))
    vectors = [(widened(tensor) - start) * share
               for tensor, share in zip(tensors, weight, strict=True)]
    return start.add(merged_matrices(_merge, vectors, key, split_qkv=split_qkv), alpha=scale)


def _merge(matrices: list[Tensor]) -> Tensor:
    left, values, right = singular(torch.stack(matrices).sum(0))
    return values.sum() / max(len(values), 1) * (left @ right)
