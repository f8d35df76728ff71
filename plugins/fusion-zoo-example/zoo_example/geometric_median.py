"""The geometric median: Pillutla et al. 2022, "Robust aggregation for federated learning",
arXiv:1912.13445."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import OptionError


def geometric_median(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    steps: int = 20,
    smoothing: float = 1e-6,
) -> Tensor:
    """The θ with the least Σ wᵢ‖θ − θᵢ‖, by the paper's smoothed Weiszfeld steps. A member that is
    far from the others pulls no harder than one that is near.

    tensors: one per member, each [*shape], in float32 or wider; none may be changed. base: not
    used; a strategy whose spec says uses={"base"} gets what the members started from. key: the
    tensor's name. weight: w, one per member, each 1 unless the user says otherwise. Returns
    [*shape]. Raises OptionError for weights that no mean can have and for options out of range.
    The paper takes the median of the flattened model, this of each tensor on its own.

    Options:
        steps: how often the shares are computed anew; 0 gives the weighted mean
        smoothing: ν, the least distance that a member is given, above 0
    """
    if min(weight) < 0 or sum(weight) == 0:
        raise OptionError("geometric_median", f"the weights of {key!r} are {list(weight)}, "
                          "expected none below 0 and at least one above")
    if steps < 0 or smoothing <= 0:
        raise OptionError("geometric_median", f"steps is {steps} and smoothing {smoothing}, "
                          "expected 0 or more and a number above 0")
    points = torch.stack([tensor.flatten() for tensor in tensors])  # (M, N)
    weights = points.new_tensor(weight)
    median = _mean(points, weights)
    for _ in range(steps):
        distances = (points - median).norm(dim=1)  # (M)
        median = _mean(points, weights / distances.clamp(min=smoothing))
    return median.reshape(tensors[0].shape)


def _mean(points: Tensor, shares: Tensor) -> Tensor:
    return shares / shares.sum() @ points  # (N)
