"""The exponential moving average of a run: Polyak and Juditsky 1992, "Acceleration of stochastic
approximation by averaging", in the form of Tarvainen and Valpola 2017, arXiv:1703.01780."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.weights.average import average


def ema(
    tensors: Sequence[Tensor],
    *,
    key: str,
    weight: Sequence[float],
    decay: float = 0.9,
) -> Tensor:
    """θ̄ ← d·θ̄ + (1−d)·θᵢ over the checkpoints of one run, from the first on.

    tensors: one per checkpoint in the order of training, each [*shape]. weight: w, factors on the
    checkpoints' shares, which are then divided by their sum. Returns float32 [*shape]. Raises
    OptionError for a decay outside [0, 1], or shares that sum to zero. Tarvainen and Valpola 2017,
    arXiv:1703.01780.

    Options:
        decay: d, the share of what was before each checkpoint, in [0, 1]; 0 is the last one
    """
    if not 0 <= decay <= 1:
        raise OptionError("ema", f"decay is {decay}, expected 0 to 1")
    last = len(tensors) - 1
    shares = [(1 if place == 0 else 1 - decay) * decay ** (last - place) * factor
              for place, factor in enumerate(weight)]
    return average(tensors, base=None, key=key, weight=shares)
