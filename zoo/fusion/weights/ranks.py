"""The rank of each entry in its row by magnitude, as DELLA asks for it."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

Ranks: TypeAlias = Literal["exact", "binned"]

# A bin holds magnitudes of one exponent and the same four bits after it, 6 % apart at most. The
# bins of a row reach down from its largest magnitude by a factor of 2¹⁶.
_DROPPED, _BINS = 19, 256
# Shorter rows are sorted: their bins would be more than their entries.
_SHORTEST = 2 * _BINS


def ranked(magnitudes: Tensor, ranks: Ranks) -> Tensor:
    """0 for the smallest entry of a row to 1 for its largest, evenly spaced; ½ in a row of one.

    magnitudes: float32 [rows, n], none negative. ranks: "exact", or "binned", which gives entries
    of nearly equal magnitude their mean rank, and sorts nothing. Returns float32 [rows, n].
    """
    width = magnitudes.shape[1]
    if width < 2 or not magnitudes.numel():
        return torch.full_like(magnitudes, 0.5)
    if ranks == "binned" and width >= _SHORTEST:
        return _binned(magnitudes)
    order = torch.from_numpy(_sorted(magnitudes.numpy())) if magnitudes.device.type == "cpu" else (
        magnitudes.argsort(dim=1))
    steps = torch.arange(width, device=magnitudes.device, dtype=torch.float32) / (width - 1)
    return torch.empty_like(magnitudes).scatter_(1, order, steps.expand_as(order))


def _sorted(magnitudes: np.ndarray) -> np.ndarray:
    """The order of each row. Magnitude and place in one number sort three times as fast as an
    argsort, and equal magnitudes keep their order."""
    keys = magnitudes.view(np.int32).astype(np.int64)
    keys <<= 32
    keys |= np.arange(keys.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys


def _binned(magnitudes: Tensor) -> Tensor:
    height, width = magnitudes.shape
    bins = magnitudes.view(torch.int32) >> _DROPPED
    bins -= bins.amax(1, keepdim=True) - (_BINS - 1)
    bins.clamp_min_(0)
    bins += torch.arange(0, height * _BINS, _BINS, dtype=torch.int32,
                         device=bins.device)[:, None]
    counts = bins.flatten().bincount(minlength=height * _BINS).view(height, _BINS)
    middle = counts.cumsum(1).double() - (counts + 1) / 2
    steps = (middle / (width - 1)).float()
    return steps.flatten().index_select(0, bins.flatten()).view_as(magnitudes)
