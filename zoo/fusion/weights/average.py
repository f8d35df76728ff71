"""The uniform soup: Wortsman et al. 2022, "Model soups", arXiv:2203.05482."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened


def average(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None = None,
    key: str,
    weight: Sequence[float],
    normalise: bool = True,
) -> Tensor:
    """Σ wᵢθᵢ / Σ wᵢ.

    tensors: one per member, each [*shape]. base: not used. weight: w, one per member, equal for
    the plain mean. Returns float32 [*shape]. Raises OptionError when the weights sum to zero.
    Wortsman et al. 2022, arXiv:2203.05482.

    Options:
        normalise: divide by Σ wᵢ; off, the members are only weighed and summed
    """
    whole = sum(weight)
    if whole == 0 and normalise:
        raise OptionError("average", f"the weights {list(weight)} of {key!r} sum to zero")
    first = widened(tensors[0])
    mean = first.clone()
    for tensor, share in zip(tensors[1:], weight[1:], strict=True):
        # Offsets from the first member keep equal members exactly equal, and never overflow.
        mean.add_(widened(tensor) - first, alpha=share / (whole if normalise else 1.0))
    return mean if normalise else mean.add_(first, alpha=whole - 1)
