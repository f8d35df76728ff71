"""WiSE-FT: Wortsman et al. 2021, "Robust fine-tuning of zero-shot models", arXiv:2109.01903."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base


def wise_ft(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    alpha: float = 0.5,
) -> Tensor:
    """θ₀ + α(θ − θ₀): a point on the line from the pretrained to the fine-tuned model.

    tensors: the one member's θ [*shape]. base: θ₀ [*shape]. weight: one factor on α, for an α per
    layer. Returns float32 [*shape], exactly θ₀ at α = 0 and θ at α = 1. Raises OptionError when
    α leaves [0, 1]. Wortsman et al. 2021, arXiv:2109.01903.

    Options:
        alpha: place on the line, in [0, 1]: 0 is the base, 1 the member
    """
    (tensor,), (factor,) = tensors, weight
    if not 0 <= alpha * factor <= 1:
        times = "" if factor == 1 else f" times the weight {factor} of {key!r}"
        raise OptionError("wise_ft", f"alpha is {alpha}{times}, expected 0 to 1; "
                          "'task_arithmetic' goes beyond, with scale")
    return torch.lerp(widened(wanted_base("wise_ft", base)), widened(tensor), alpha * factor)
