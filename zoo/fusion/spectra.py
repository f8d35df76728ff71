"""Singular vectors of task vectors, exact enough for float32 and fast for wide matrices.

Everything comes from the eigenvectors of the smaller Gram matrix, in float64: what its rounding
takes from a singular value is far below float32's own. Directions that only rounding fills are
left out; an SVD would give them arbitrary singular vectors, which some methods then make large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from zoo.fusion.precision import doubled

# U [m, r], s [r] and Vᵀ [r, n].
Factors: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Singular values up to this part of the largest are taken for zero.
_CUT = 1e-6


def singular(matrix: Tensor, most: int | None = None) -> Factors:
    """U [m, r], s [r] and Vᵀ [r, n] of a matrix [m, n], largest first, without what is zero; the
    largest ones only, where `most` is given."""
    rows, columns = matrix.shape
    if rows > columns:
        left, values, right = singular(matrix.mT, most)
        return right.mT, values, left.mT
    vectors, values = (part[..., :most] for part in _eigen(matrix @ matrix.mT))
    return vectors, values, vectors.mT @ matrix / values[:, None]


def polar(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with all its singular values set to one: the nearest whose columns (or
    rows) are orthonormal, where none of them depends on the others."""
    if matrix.shape[0] > matrix.shape[1]:
        return polar(matrix.mT).mT
    vectors, values = _eigen(matrix @ matrix.mT)
    return (vectors / values) @ (vectors.mT @ matrix)


def side_by_side(factors: Sequence[Factors]) -> Factors:
    """U [m, R], s [R] and Vᵀ [R, n] of several matrices, without what is zero beside the others:
    a member that did not move has no directions, only rounding."""
    values = torch.cat([s for _, s, _ in factors])
    kept = values > _CUT * values.sort(descending=True)[0][:1]
    return (torch.cat([u for u, _, _ in factors], 1)[:, kept], values[kept],
            torch.cat([v for _, _, v in factors])[kept])


def merged_matrices(
    merge: Callable[[list[Tensor]], Tensor],
    vectors: Sequence[Tensor],
    key: str,
    *,
    split_qkv: bool,
) -> Tensor:
    """What `merge` makes of the members' matrices, or the mean of what is no matrix.

    A convolution is a matrix (out, in · height · width). No matrices are vectors, scalars,
    depthwise kernels and other convolutions with one input channel, and embeddings (1, …).

    merge: of one float64 matrix [m, n] per member, m, n > 1, to one. vectors: task vectors, each
    [*shape]. split_qkv: give the rows of a fused query, key and value to `merge` one third at a
    time. Returns [*shape].
    """
    first = vectors[0]
    if not is_matrix(first):
        return torch.stack(list(vectors)).mean(0)
    matrices = [doubled(vector.flatten(1)) for vector in vectors]
    parts = 3 if split_qkv and is_qkv(key, first) else 1
    thirds = zip(*(matrix.chunk(parts) for matrix in matrices), strict=True)
    merged = torch.cat([merge(list(third)) for third in thirds])
    return merged.to(first.device, first.dtype).reshape(first.shape)


def is_matrix(tensor: Tensor) -> bool:
    """Whether there are several outputs, of several inputs each."""
    return (tensor.dim() >= 2 and tensor.shape[0] > 1 and tensor[0].numel() > 1
            and (tensor.dim() == 2 or tensor.shape[1] > 1))


def is_qkv(key: str, tensor: Tensor) -> bool:
    """Whether these are the rows of query, key and value of an attention: timm's `qkv.weight`,
    torch's `in_proj_weight`."""
    return (key.endswith(("qkv.weight", "in_proj_weight")) and tensor.dim() == 2
            and tensor.shape[0] % 3 == 0)


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns and square roots of the eigenvalues, largest first, without zeros."""
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0).sqrt().flip(0)
    kept = values > _CUT * values[:1]
    return vectors.flip(1)[:, kept], values[kept]
