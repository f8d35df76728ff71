"""Concatenation of normalised features; layer norm is Ba et al. 2016, arXiv:1607.06450."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Concat(nn.Module):
    """Each member's features, layer-normalised, side by side.

    dims: D of each member. Takes their features, each [B, Dᵢ], and gives [B, ΣDᵢ]. Raises
    OptionError for a dropout outside [0, 1).

    Options:
        norm: a layer norm per member, so that none outweighs another by its scale
        dropout: probability, in [0, 1), of zeroing a feature in training
    """

    def __init__(self, dims: Sequence[int], *, norm: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise OptionError("concat", f"dropout is {dropout}, expected a probability in [0, 1)")
        self.out_features = sum(dims)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for dim in dims)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        normed = [norm(one) for norm, one in zip(self.norms, features, strict=True)]
        joined: Tensor = self.dropout(torch.cat(normed, 1))  # (B, D)
        return joined
