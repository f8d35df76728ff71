"""Stochastic weight averaging: Izmailov et al. 2018, "Averaging weights leads to wider optima and
better generalization", arXiv:1803.05407."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.weights.average import average


def swa(
    tensors: Sequence[Tensor],
    *,
    key: str,
    weight: Sequence[float],
    start: int = 0,
    every: int = 1,
) -> Tensor:
    """The mean of the checkpoints of one run, from the one at `start` on, every c-th of them.

    Batch norm's statistics belong to no checkpoint's mean: estimate them again (`norms=`).

    tensors: one per checkpoint in the order of training, each [*shape]. weight: w, one per
    checkpoint. Returns float32 [*shape]. Raises OptionError when no checkpoint is left, or the
    weights of those that are sum to zero. Izmailov et al. 2018, arXiv:1803.05407.

    Options:
        start: how many of the first checkpoints are left out
        every: c, takes one checkpoint of so many; 1 takes all
    """
    if every < 1 or not 0 <= start < len(tensors):
        raise OptionError("swa", f"start is {start} and every is {every}, expected a start below "
                          f"the {len(tensors)} checkpoints and every 1 or more")
    return average(tensors[start::every], base=None, key=key, weight=weight[start::every])
