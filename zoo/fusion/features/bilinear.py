"""Low-rank bilinear pooling: Kim et al. 2017, "Hadamard Product for Low-rank Bilinear Pooling",
arXiv:1610.04325; the normalisation is that of Lin et al. 2015, "Bilinear CNN Models for
Fine-grained Visual Recognition", arXiv:1504.07889."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError


class Bilinear(nn.Module):
    """Ux ∘ Vy, for more members the product of all projections; then the signed square root, and
    the L2 norm.

    Each member's features are layer-normalised first. The projections have biases that start at
    one, so that the product begins with each member alone beside their pairs. The fused features
    have length √hidden, as of a layer norm, and not 1: a head learns from them at a common pace.

    dims: D of each member. Takes their features, each [B, Dᵢ], and gives [B, hidden]. Raises
    OptionError when hidden is not positive.

    Options:
        hidden: the rank, which is the width of the projections and of the fused features
    """

    def __init__(self, dims: Sequence[int], *, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 1:
            raise OptionError("bilinear", f"hidden is {hidden}, expected a positive number")
        self.out_features = hidden
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden)) for dim in dims)
        for name, parameter in self.projections.named_parameters():
            if name.endswith("1.bias"):
                nn.init.ones_(parameter)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        product = reduce(torch.mul, (project(one) for project, one in
                                     zip(self.projections, features, strict=True)))
        # sign(z) √|z| but near zero, where its slope has no bound.
        rooted = product / (product.abs() + 1e-4).sqrt()
        return functional.normalize(rooted, dim=1) * math.sqrt(self.out_features)  # (B, hidden)
