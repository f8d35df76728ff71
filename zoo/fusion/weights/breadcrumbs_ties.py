"""Model Breadcrumbs with TIES: Davari and Belilovsky 2023, arXiv:2312.06795, and Yadav et al. 2023,
"TIES-Merging", arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.fusion.precision import widened
from zoo.fusion.weights.breadcrumbs import masked
from zoo.fusion.weights.selection import Seen
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import with_elected
from zoo.options import PerMember


def breadcrumbs_ties(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Seen] = (),
    density: PerMember = 0.15,
    gamma: PerMember = 0.01,
    scale: float = 1.0,
    normalise: bool = False,
    election: Literal["sum", "count"] = "sum",
) -> Tensor:
    """Drop the largest and the smallest entries of each task vector, elect signs: θ₀ + λτ.

    The masks are those of `breadcrumbs`, the election that of `ties`. Arguments and errors: see
    there. Davari and Belilovsky 2023, arXiv:2312.06795; the combination is mergekit's.

    Options:
        density: fraction of entries that stay, in (0, 1]; 1 keeps all; or one per member
        gamma: fraction of entries, the largest, that go first, in [0, 1); or one per member
        scale: λ on the merged task vector
        normalise: divide by the weights of the members that agree; off, they are summed
        election: the sign is that of the sum of the members' changes, or of the greater count
    """
    start = widened(wanted_base("breadcrumbs_ties", base))
    changes = masked("breadcrumbs_ties", tensors, start, measured, key, density, gamma)
    return with_elected(changes, weight, normalise=normalise, election=election, scale=scale)
