"""DELLA: Deep et al. 2024, "DELLA-Merging: reducing interference in model merging through
magnitude-based sampling", arXiv:2406.11617."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.della_linear import MagPrune
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import Changes, with_elected
from zoo.options import PerMember


def della(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    offset: int = 0,
    shape: Sequence[int] | None = None,
    seed: int = 0,
    density: PerMember = 0.5,
    epsilon: PerMember = 0.15,
    scale: float = 1.0,
    rescale: bool = True,
    ranks: Literal["exact", "binned"] = "exact",
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool = True,
    election: Literal["sum", "count"] = "sum",
) -> Tensor:
    """Drop entries at random, small ones more often, elect signs, fuse those that agree: θ₀ + λτ.

    The pruning is that of `della_linear`, the election that of `ties`. Arguments and errors: see
    there. Deep et al. 2024, arXiv:2406.11617.

    Options:
        density: mean probability of keeping an entry, in (0, 1]; 1 keeps all, whatever epsilon is;
            or one per member
        epsilon: how much more or less likely the largest and the smallest entry of a row are kept;
            or one per member
        scale: λ on the merged task vector
        rescale: make up for what was dropped
        ranks: "exact", or "binned": magnitudes within 6 % of each other share a rank; faster
        convention: rows are output channels, each kept entry is divided by its probability
            ("paper"); rows along axis 1, the L1 norm of each tensor is kept ("mergekit")
        normalise: divide by the weights of the members that agree; off, they are summed
        election: the sign is that of the sum of the members' changes, or of the greater count
    """
    start = widened(wanted_base("della", base))
    prune = MagPrune("della", density, epsilon, rescale, ranks, convention, (seed, key), offset,
                     tuple(start.shape if shape is None else shape))
    changes = Changes(start, list(prune(tensors, start, measured)), ready=True)
    return with_elected(changes, weight, normalise=normalise, election=election, scale=scale)
