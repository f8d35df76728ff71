"""TIES: Yadav et al. 2023, "TIES-Merging: resolving interference when merging models",
arXiv:2306.01708."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.selection import (
    Places,
    Seen,
    at_places,
    at_places_of,
    look,
    magnitudes,
    note_magnitudes,
)
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    Changes,
    Convention,
    densities,
    is_small,
    is_whole,
    with_elected,
)
from zoo.options import PerMember


def ties(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Seen] = (),
    density: PerMember = 0.2,
    scale: float = 1.0,
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool = True,
    election: Literal["sum", "count"] = "sum",
) -> Tensor:
    """Trim each task vector, elect a sign per entry, average those that agree: θ₀ + λτ.

    The elected sign is that of Σ wᵢτ̂ᵢ, where a sum of exactly zero counts as +; entries that were
    trimmed have no vote. Entries as large as the k-th largest are all kept.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member, which
    multiplies τ̂ᵢ before the election. measured: the sums of `measure` over the model or the
    tensor; without them these entries are trimmed on their own. Returns float32 [*shape]. Raises
    OptionError for a density outside (0, 1]. Yadav et al. 2023, arXiv:2306.01708; mergekit differs
    in the scope of the trim, and in rounding the task vectors to the input's precision, which is
    left out.

    Options:
        density: fraction of entries that the trim keeps, in (0, 1]; or one per member
        scale: λ on the merged task vector
        convention: trim over the flattened model ("paper") or each tensor ("mergekit")
        normalise: divide by the weights of the members that agree; off, they are summed
        election: the sign is that of the sum of the members' changes, or of the greater count
    """
    kept = densities("ties", density, len(tensors), key)
    start = widened(wanted_base("ties", base))
    ends = None
    if min(kept) < 1:
        places = _places(kept)
        least = (at_places(measured, places) if measured else
                 at_places_of(magnitudes(start, *tensors), places))
        ends = [(first, math.inf) for (first,) in least]
    return with_elected(Changes(start, tensors, ends=ends), weight, normalise=normalise,
                        election=election, scale=scale)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    shape: Sequence[int],
    measured: Sequence[Seen],
    density: PerMember,
    convention: Convention,
) -> Seen | None:
    """A slice's part in finding the k-th largest |τ| of each member in the model or the tensor."""
    kept = densities("ties", density, len(tensors), key)
    if min(kept) == 1 or (convention == "mergekit" and is_small(tensors[0], shape)):
        return None
    start = widened(wanted_base("ties", base))
    return look(magnitudes, (start, *tensors), measured, _places(kept), note=note_magnitudes,
                whole=convention == "mergekit" and is_whole(tensors[0], shape))


def _places(kept: Sequence[float]) -> Places:
    return lambda size, row: [max(1, int(kept[row] * size))]
