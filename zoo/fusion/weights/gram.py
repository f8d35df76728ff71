"""Methods that need to know no more of the members than their lengths and angles.

Those are in the Gram matrix Gᵢⱼ = ⟨xᵢ, xⱼ⟩ of the members, or of their task vectors where there is
a base; the rest is one weighted sum. Several methods differ only in the coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.task_vectors import is_small

# What is one vector: the whole tensor; each row, which is one index of the first axis; or each
# column, which runs along the first axis. A tensor of one axis is one row, and one column.
Over: TypeAlias = Literal["tensor", "rows", "columns"]

# Dot products over more entries of float32 would lose digits, and these stay in the cache.
_BLOCK = 1 << 16


def measure(
    tensors: Sequence[Tensor],
    *,
    measured: Sequence[Tensor],
    base: Tensor | None = None,
    shape: Sequence[int] | None = None,
    over: Over = "tensor",
) -> Tensor | None:
    """A slice's part in the tensor's Gram matrix, float64 [M, M], or in that of each column
    [columns, M, M]; None when it is known."""
    if measured or over == "rows" or is_small(tensors[0], shape):
        return None
    if over == "columns":
        return gram_of_rows([columns(tensor, shape) for tensor in tensors],
                            None if base is None else columns(base, shape))
    return gram(tensors, base)


def gram(tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """The Gram matrix of tensors [*shape], or of what each changed in the base; float64 [M, M]."""
    flat = [widened(tensor).reshape(-1) for tensor in tensors]
    start = None if base is None else widened(base).reshape(-1)
    pairs = list(combinations_with_replacement(range(len(flat)), 2))
    products = flat[0].new_zeros(len(pairs), dtype=torch.float64)
    for begin in range(0, flat[0].numel(), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        vectors = [tensor[part] if start is None else tensor[part] - start[part]
                   for tensor in flat]
        products += torch.stack([vectors[one].dot(vectors[other]) for one, other in pairs])
    return _symmetric(products, pairs)


def gram_of_rows(matrices: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """The Gram matrix of each row of matrices [rows, n]; float64 [rows, M, M]."""
    vectors = [widened(matrix) if base is None else widened(matrix) - widened(base)
               for matrix in matrices]
    pairs = list(combinations_with_replacement(range(len(vectors)), 2))
    products = torch.stack([(vectors[one] * vectors[other]).sum(1) for one, other in pairs], 1)
    return _symmetric(products.double(), pairs)


def rows(tensor: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Whole rows of a tensor of this shape as a matrix [rows, n]; the tensor may be flat."""
    shape = tensor.shape if shape is None else shape
    width = math.prod(shape[1:]) if len(shape) > 1 else tensor.numel()
    return tensor.reshape(-1, max(width, 1))


def columns(tensor: Tensor, shape: Sequence[int] | None) -> Tensor:
    """Whole rows of a tensor of this shape as the columns' parts in them, [columns, rows]."""
    shape = tensor.shape if shape is None else shape
    return rows(tensor, shape).mT if len(shape) > 1 else tensor.reshape(1, -1)


def weighted_sum(tensors: Sequence[Tensor], shares: Tensor, base: Tensor | None = None) -> Tensor:
    """Σ sᵢxᵢ, or θ₀ + Σ sᵢτᵢ with a base.

    tensors, base: each [*shape]. shares: s, [M], or [rows, M] where the tensors are [rows, n].
    """
    total: Tensor | None = None
    start = None if base is None else widened(base)
    for tensor, share in zip(tensors, shares.unbind(-1), strict=True):
        vector = widened(tensor) if start is None else widened(tensor) - start
        if share.dim() == 0:
            factor = share.item()
            total = vector * factor if total is None else total.add_(vector, alpha=factor)
        else:
            column = share.to(vector.dtype)[:, None]
            total = vector * column if total is None else total.addcmul_(vector, column)
    assert total is not None
    return total if start is None else total.add_(start)


def lengths(known: Tensor) -> Tensor:
    """‖xᵢ‖ from a Gram matrix [..., M, M]: [..., M]."""
    return known.diagonal(dim1=-2, dim2=-1).sqrt()


def proportions(strategy: str, weight: Sequence[float], key: str, like: Tensor) -> Tensor:
    """The weights divided by their sum, float64 [M]. Raises OptionError when that is zero."""
    whole = sum(weight)
    if whole == 0:
        raise OptionError(strategy, f"the weights {list(weight)} of {key!r} sum to zero")
    return torch.tensor(weight, dtype=torch.float64, device=like.device) / whole


def _symmetric(products: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """[..., pairs] as [..., M, M]."""
    size = pairs[-1][0] + 1
    order = torch.empty(size, size, dtype=torch.int64)
    for number, (one, other) in enumerate(pairs):
        order[one, other] = order[other, one] = number
    return products[..., order.to(products.device)]
