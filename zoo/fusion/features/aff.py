"""Attentional feature fusion: Dai et al. 2021, "Attentional Feature Fusion", arXiv:2009.14082."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.errors import OptionError


class Aff(nn.Module):
    """M(X + Y) ⊗ X + (1 − M(X + Y)) ⊗ Y: at every position and channel, attention M shares the
    weight between two members' maps X and Y; a third is fused with the result, and so on.

    Each member's maps are projected to one width by a 1 × 1 convolution and batch norm first, and
    the fused maps are averaged over their positions at the end. The batch norms keep running
    statistics: in evaluation no image depends on another, in training a batch has two or more.

    dims: D of each member. Takes their maps, each [B, Dᵢ, H, W], and gives [B, hidden]. Raises
    OptionError when an option is not positive or reduction is more than hidden.

    Options:
        hidden: width of the projected maps and of the fused features
        reduction: how many times narrower the attention is inside
    """

    name = "aff"

    def __init__(self, dims: Sequence[int], *, hidden: int = 256, reduction: int = 4) -> None:
        super().__init__()
        if min(hidden, reduction) < 1 or reduction > hidden:
            raise OptionError(self.name, f"hidden is {hidden} and reduction {reduction}, expected "
                              "positive numbers, reduction at most hidden")
        self.out_features = hidden
        self.projections = nn.ModuleList(_projection(dim, hidden) for dim in dims)
        self.attentions = nn.ModuleList(
            ChannelAttention(hidden, hidden // reduction) for _ in dims[1:])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x, *others = [project(one) for project, one
                      in zip(self.projections, maps, strict=True)]  # (B, hidden, H, W)
        for step, y in enumerate(others):
            x = self.fuse(step, x, y)
        fused: Tensor = x.mean((2, 3))
        return fused

    def fuse(self, step: int, x: Tensor, y: Tensor) -> Tensor:
        """Two maps of one width and grid, the (step + 1)-th time that two are fused, to one."""
        m = self.attentions[step](x + y)
        fused: Tensor = m * x + (1 - m) * y
        return fused


class ChannelAttention(nn.Module):
    """The paper's multi-scale channel attention: σ(L(X) + G(X)), the context of every position and
    that of the whole map. Takes and gives [B, C, H, W], each value in (0, 1)."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.local_context = _bottleneck(channels, inside)
        self.global_context = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_bottleneck(channels, inside))

    def forward(self, x: Tensor) -> Tensor:
        attention: Tensor = (self.local_context(x) + self.global_context(x)).sigmoid()
        return attention


def _bottleneck(channels: int, inside: int) -> nn.Sequential:
    return nn.Sequential(*_projection(channels, inside), nn.ReLU(), *_projection(inside, channels))


def _projection(channels: int, to: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, to, 1, bias=False), nn.BatchNorm2d(to))
