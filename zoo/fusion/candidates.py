"""Whole states for strategies of scope "model" that try what they fuse on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from zoo.fusion.merging import mixture, pooled
from zoo.fusion.norms import MEAN, VARIANCE
from zoo.fusion.weights.average import average


def own_keys(net: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The keys of the state that the network must be given, of tied tensors the first alone."""
    return tuple(key for key, _ in (*net.named_parameters(), *net.named_buffers()) if key in state)


def is_statistic(key: str) -> bool:
    """Whether this is a running mean or variance of a batch norm."""
    return key.rpartition(".")[2] in (MEAN, VARIANCE)


def completed(
    fused: Mapping[str, Tensor], states: Sequence[Mapping[str, Tensor]], weight: Sequence[float]
) -> dict[str, Tensor]:
    """A whole state: what is fused, and of all other tensors what the core makes of them: running
    statistics pooled, floating ones averaged, integers the first member's.

    weight: one number per member; who is subtracted has no part.
    """
    shares = mixture(weight)
    whole: dict[str, Tensor] = {}
    for key, first in states[0].items():
        if key in fused:
            whole[key] = fused[key]
        elif is_statistic(key):
            whole[key] = pooled(states, key, shares)
        elif first.is_floating_point():
            whole[key] = average([state[key] for state in states], base=None, key=key,
                                 weight=shares)
        else:
            whole[key] = first
    return whole
