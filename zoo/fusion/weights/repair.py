"""An average with REPAIR: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", arXiv:2211.08403."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from zoo.fusion.align.repairing import repaired, shares_of
from zoo.fusion.weights.average import average


def repair(
    states: Sequence[Mapping[str, Tensor]],
    *,
    base: Mapping[str, Tensor] | None,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Σ wᵢθᵢ / Σ wᵢ, whose activations get the members' mean and deviation again, on data.

    For members that are aligned already, such as fine-tunes of one base; `rebasin` aligns others
    and has the same as an option. states: one whole state per member. base: not used. weights: w
    by key, one per member. module, data: the network and batches [B, ...] for it. Returns the
    whole state. Jordan et al. 2023, arXiv:2211.08403.
    """
    fused = {key: average([state[key] for state in states], base=None, key=key, weight=share)
             for key, share in weights.items()}
    return repaired(module, {**states[0], **fused}, states, shares_of(weights), data)
