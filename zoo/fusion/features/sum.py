"""The weighted sum of projected features: Tan et al. 2020, "EfficientDet: Scalable and Efficient
Object Detection", arXiv:1911.09070, its softmax-based fusion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Sum(nn.Module):
    """Σᵢ wᵢ Vᵢzᵢ with learned weights w = softmax(a) over the members, equal at the start.

    Each member's features are layer-normalised and projected to one width first.

    dims: D of each member. Takes their features z, each [B, Dᵢ], and gives [B, hidden]. Raises
    OptionError when hidden is not positive.

    Options:
        hidden: width of the projected and of the fused features
    """

    def __init__(self, dims: Sequence[int], *, hidden: int = 256) -> None:
        super().__init__()
        if hidden < 1:
            raise OptionError("sum", f"hidden is {hidden}, expected a positive number")
        self.out_features = hidden
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden)) for dim in dims)
        self.weights = nn.Parameter(torch.zeros(len(dims)))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        projected = torch.stack([project(one) for project, one
                                 in zip(self.projections, features, strict=True)], 2)
        # A mean of M like members is √M times narrower than one; the head should not see that.
        weights = self.weights.softmax(0) * len(self.weights) ** 0.5
        added: Tensor = projected @ weights.to(projected.dtype)  # (B, hidden, M) to (B, hidden)
        return added
