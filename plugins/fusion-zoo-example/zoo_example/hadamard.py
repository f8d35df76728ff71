"""Low-rank bilinear pooling: Kim et al. 2017, "Hadamard product for low-rank bilinear pooling",
arXiv:1610.04325."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Hadamard(nn.Module):
    """∏ᵢ tanh(Uᵢzᵢ + bᵢ), entry by entry: what the members say together, where `concat` puts what
    they say side by side. The paper's outer projection is the classifier that follows.

    dims: D of each member. Takes their features z, each [B, Dᵢ], and gives [B, rank]. Raises
    OptionError when rank is not positive.

    Options:
        rank: width of the fused features
    """

    def __init__(self, dims: Sequence[int], *, rank: int = 256) -> None:
        super().__init__()
        if rank < 1:
            raise OptionError("hadamard", f"rank is {rank}, expected a positive number")
        self.out_features = rank
        self.projections = nn.ModuleList(nn.Linear(dim, rank) for dim in dims)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        projected = [projection(one).tanh() for projection, one
                     in zip(self.projections, features, strict=True)]
        return torch.stack(projected).prod(0)  # (B, rank)
