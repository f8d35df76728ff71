"""Weights that are scaled when they are used: Karras et al. 2018, "Progressive Growing of GANs for
Improved Quality, Stability, and Variation", arXiv:1710.10196, section 4.1."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Scaled(nn.Linear):
    """A linear layer with weights of variance 1 at the start, divided by the root of its width when
    they are used.

    A step of Adam is as large as the learning rate whatever the weights are, and weights that are
    small by themselves would be others after a few.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x / self.in_features**0.5, self.weight, self.bias)
