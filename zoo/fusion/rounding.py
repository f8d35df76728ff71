"""Casting a merged tensor: to the nearest value, or at random to one of the two around it.

A task vector is often smaller than the steps of bfloat16 around its weight. Rounded to nearest,
such changes are lost; rounded up or down with the probability that keeps the mean, they live on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.fusion.randomness import uniform16


def rounded(
    values: Tensor, dtype: torch.dtype, mode: str, stream: tuple[int, str], offset: int
) -> Tensor:
    """The values in another floating dtype.

    values: one dimension, float32 or float64. mode: `"nearest"`, or `"stochastic"`, which rounds
    to bfloat16 and float16 up or down so that the mean is kept (nearest for any other dtype).
    stream, offset: what the random numbers of these elements depend on: seed and key, and the
    place of the first in the tensor.
    """
    nearest = values.to(dtype)
    if mode == "nearest" or dtype not in (torch.bfloat16, torch.float16):
        return nearest
    chance = uniform16(stream, offset, values.numel())  # (n,) in [0, 1)
    error = values - nearest.to(values.dtype)
    bits = nearest.view(torch.int16)
    # The neighbour on the error's side: floats count like sign and magnitude.
    away = (error > 0) == (bits >= 0)
    neighbour = torch.where(nearest == 0, torch.where(error > 0, 1, -0x7FFF).to(torch.int16),
                            bits + torch.where(away, 1, -1).to(torch.int16)).view(dtype)
    gap = (neighbour.to(values.dtype) - nearest.to(values.dtype)).abs()
    moves = (chance * gap < error.abs()) & neighbour.isfinite()
    return torch.where(moves, neighbour, nearest)
