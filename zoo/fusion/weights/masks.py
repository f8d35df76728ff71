"""Random masks of task vectors. What is kept depends on the seed, the tensor's key, the member's
place and the entry alone, so that cuts and threads do not matter."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.fusion.randomness import random16, uniform16

STEPS = 1 << 16


def in_steps(probability: float) -> float:
    """The nearest probability above zero that 16 random bits can have."""
    return max(round(probability * STEPS), 1) / STEPS


def even_mask(
    probability: float, stream: tuple[object, ...], offset: int, like: Tensor
) -> Tensor:
    """1 with this probability (see `in_steps`) and 0 otherwise, shaped like a tensor."""
    bits = random16(stream, offset, like.numel())
    kept = bits < np.uint16(probability * STEPS) if probability < 1 else np.ones(bits.shape, bool)
    return _like(torch.from_numpy(kept.astype(np.float32)), like)


def mask(probabilities: Tensor, stream: tuple[object, ...], offset: int) -> Tensor:
    """1 with each entry's own probability and 0 otherwise, shaped like the probabilities."""
    # In the middle of each step, so that the mean of the mask is right to half a step.
    chance = uniform16(stream, offset, probabilities.numel()).add_(0.5 / STEPS)
    chance = _like(chance, probabilities)
    return torch.lt(chance, probabilities, out=chance)


def _like(flat: Tensor, like: Tensor) -> Tensor:
    return flat.to(like.device, like.dtype).reshape(like.shape)
