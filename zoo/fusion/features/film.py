"""Feature-wise linear modulation: Perez et al. 2018, "FiLM: Visual Reasoning with a General
Conditioning Layer", arXiv:1709.07871."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError


class Film(nn.Module):
    """The paper's residual block on the first member's features, modulated by those of all others:
    x + ReLU(γ ∘ norm(Wx) + β) with x = ReLU(V z₁), γ = 1 + Γ[z₂, z₃, …] and β = B[z₂, z₃, …].

    The first member is what is looked at, the others say how; their order matters. Each member's
    features are layer-normalised first, and a layer norm stands for the paper's batch norm.

    dims: D of each member. Takes their features z, each [B, Dᵢ], and gives [B, hidden]. Raises
    OptionError when hidden is not positive.

    Options:
        hidden: width of the modulated and of the fused features
    """

    def __init__(self, dims: Sequence[int], *, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 1:
            raise OptionError("film", f"hidden is {hidden}, expected a positive number")
        self.out_features = hidden
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.enter = nn.Linear(dims[0], hidden)
        self.inside = nn.Linear(hidden, hidden)
        self.modulation = nn.Linear(sum(dims[1:]), 2 * hidden)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        first, *others = [norm(one) for norm, one in zip(self.norms, features, strict=True)]
        gamma, beta = self.modulation(torch.cat(others, 1)).chunk(2, 1)  # (B, hidden) each
        x = self.enter(first).relu()
        normed = functional.layer_norm(self.inside(x), (self.out_features,))
        modulated: Tensor = x + ((1 + gamma) * normed + beta).relu()
        return modulated  # (B, hidden)
