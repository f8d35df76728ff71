"""The gated multimodal unit: Arevalo et al. 2017, "Gated multimodal units for information
fusion", arXiv:1702.01992."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.fusion.features.scaled import Scaled


class Gated(nn.Module):
    """Σᵢ gᵢ ∘ tanh(Vᵢzᵢ) with the gates g = softmax(W[z₁, z₂, …]) over the members.

    Each output unit has its own gates; for two members they are the paper's tied σ and 1 − σ. W is
    scaled when it is used (zoo.fusion.features.scaled): at high learning rates the gates of so many
    features would close before the values are learnt.

    dims: D of each member. Takes their features z, each [B, Dᵢ], and gives [B, hidden]. Raises
    OptionError when hidden is not positive.

    Options:
        hidden: width of the fused features
    """

    def __init__(self, dims: Sequence[int], *, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 1:
            raise OptionError("gated", f"hidden is {hidden}, expected a positive number")
        self.out_features = hidden
        self.values = nn.ModuleList(nn.Linear(dim, hidden, bias=False) for dim in dims)
        self.gates = Scaled(sum(dims), len(dims) * hidden, bias=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        values = torch.stack([value(one).tanh() for value, one
                              in zip(self.values, features, strict=True)], 1)  # (B, M, hidden)
        gates: Tensor = self.gates(torch.cat(list(features), 1)).view(values.shape).softmax(1)
        return (gates * values).sum(1)  # (B, hidden)
