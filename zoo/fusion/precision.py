"""The precision that fusions compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """The same values in float32, or in float64 where that is what they are."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def doubled(tensor: Tensor) -> Tensor:
    """The same values in float64; on the CPU, where their device has none (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
