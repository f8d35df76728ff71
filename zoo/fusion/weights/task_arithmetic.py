"""Task arithmetic: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from zoo.errors import FusionError, OptionError
from zoo.fusion.precision import widened

T = TypeVar("T")


def task_arithmetic(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    scale: float = 1.0,
    normalise: bool = False,
) -> Tensor:
    """θ₀ + λ Σ wᵢτᵢ with the task vectors τᵢ = θᵢ − θ₀; a negative weight forgets a task.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. Returns
    float32 [*shape]. Raises OptionError when the weights to normalise by sum to zero.
    Ilharco et al. 2023, arXiv:2212.04089; mergekit's numerics are the same, with its own
    `normalize`, but for the task vectors' rounding to the input's precision, which is left out.

    Options:
        scale: λ on the sum of the task vectors; 0.3 to 0.5 suits several members
        normalise: divide the sum by Σ wᵢ, as mergekit offers
    """
    whole = sum(weight) if normalise else 1.0
    if whole == 0:
        raise OptionError("task_arithmetic",
                          f"the weights {list(weight)} of {key!r} sum to zero; set normalise=False")
    start = widened(wanted_base("task_arithmetic", base))
    total = torch.zeros_like(start)
    for tensor, share in zip(tensors, weight, strict=True):
        total.add_(widened(tensor) - start, alpha=share)
    return start.add(total, alpha=scale / whole)


def wanted_base(strategy: str, base: T | None) -> T:
    """The base of a strategy that cannot do without. Raises FusionError when it is None."""
    if base is None:
        raise FusionError(strategy, "it starts from a base model, and none is given", "Pass base=")
    return base
