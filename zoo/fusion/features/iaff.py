"""Iterative attentional feature fusion: Dai et al. 2021, "Attentional Feature Fusion",
arXiv:2009.14082, section 3.4."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.fusion.features.aff import Aff, ChannelAttention


class Iaff(Aff):
    """`aff` whose attention looks at what `aff` gives, where that looks at the mere sum:
    M(A) ⊗ X + (1 − M(A)) ⊗ Y with A = M′(X + Y) ⊗ X + (1 − M′(X + Y)) ⊗ Y.

    dims: D of each member. Takes their maps, each [B, Dᵢ, H, W], and gives [B, hidden]. Raises
    OptionError when an option is not positive or reduction is more than hidden.

    Options:
        hidden: width of the projected maps and of the fused features
        reduction: how many times narrower the attentions are inside
    """

    name = "iaff"

    def __init__(self, dims: Sequence[int], *, hidden: int = 256, reduction: int = 4) -> None:
        super().__init__(dims, hidden=hidden, reduction=reduction)
        self.second = nn.ModuleList(
            ChannelAttention(hidden, hidden // reduction) for _ in dims[1:])

    def fuse(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        m = self.second[step](super().fuse(step, x, y))
        fused: Tensor = m * x + (1 - m) * y
        return fused
