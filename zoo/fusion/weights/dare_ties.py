"""DARE with TIES: Yu et al. 2024, "Language models are super Mario", arXiv:2311.03099, and Yadav
et al. 2023, "TIES-Merging", arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.dare_linear import dropped
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import with_elected
from zoo.options import PerMember


def dare_ties(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    offset: int = 0,
    seed: int = 0,
    density: PerMember = 0.5,
    scale: float = 1.0,
    rescale: bool = True,
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool | None = None,
    election: Literal["sum", "count"] = "sum",
) -> Tensor:
    """Drop entries of each task vector at random, rescale the rest, elect signs: θ₀ + λτ.

    The election is that of `ties`, and what agrees is averaged or summed; nothing is trimmed by
    magnitude. Arguments and errors: see `dare_linear`. Yu et al. 2024, arXiv:2311.03099, whose
    experiments also trim as TIES does.

    Options:
        density: probability of keeping an entry, the paper's 1 − p, in (0, 1]; in steps of 2⁻¹⁶;
            or one per member
        scale: λ on the merged task vector
        rescale: make up for what was dropped
        convention: by 1/density ("paper"), or to the L1 norm that each tensor had ("mergekit")
        normalise: divide by the weights of the members that agree; null, only as "paper"
        election: the sign is that of the sum of the members' changes, or of the greater count
    """
    start = widened(wanted_base("dare_ties", base))
    changes = dropped("dare_ties", tensors, start, measured, (seed, key), offset, density,
                      rescale, convention)
    divided = convention == "paper" if normalise is None else normalise
    return with_elected(changes, weight, normalise=divided, election=election, scale=scale)
