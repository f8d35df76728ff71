"""Squeeze and excitation over all members' channels: Hu et al. 2018, "Squeeze-and-Excitation
Networks", arXiv:1709.01507."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Se(nn.Module):
    """z ∘ σ(W₂ ReLU(W₁z)): a gate for each channel of the members' features side by side, from
    the channels of all of them.

    The features are what the paper squeezes out of maps, their means; scaling the maps and then
    averaging them would give the same. Each member's are layer-normalised first.

    dims: D of each member. Takes their features, each [B, Dᵢ], and gives [B, ΣDᵢ]. Raises
    OptionError when reduction is not positive or more than ΣDᵢ.

    Options:
        reduction: how many times narrower the excitation is inside
    """

    def __init__(self, dims: Sequence[int], *, reduction: int = 4) -> None:
        super().__init__()
        width = sum(dims)
        if not 1 <= reduction <= width:
            raise OptionError("se", f"reduction is {reduction}, expected a positive number, at "
                              f"most the members' {width} features")
        self.out_features = width
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.excitation = nn.Sequential(
            nn.Linear(width, width // reduction), nn.ReLU(),
            nn.Linear(width // reduction, width), nn.Sigmoid())

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        z = torch.cat([norm(one) for norm, one in zip(self.norms, features, strict=True)], 1)
        gated: Tensor = z * self.excitation(z)
        return gated  # (B, ΣD)
