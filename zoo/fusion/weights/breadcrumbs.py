"""Model Breadcrumbs: Davari and Belilovsky 2023, "Model Breadcrumbs: scaling multi-task model
merging with sparse masks", arXiv:2312.06795."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.errors import OptionError
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
    densities,
    for_members,
    is_small,
    is_whole,
    whose,
    with_sum,
)
from zoo.options import PerMember


def breadcrumbs(
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
) -> Tensor:
    """Drop the largest and the smallest entries of each task vector, and add: θ₀ + λ Σ wᵢτ̂ᵢ.

    Of the n entries of a tensor the γn largest go, and of the rest the density·n largest stay; if
    there are not so many, fewer of the largest go. Entries as large as one that stays, stay.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. measured:
    the sums of `measure` over the tensor; without them these entries are masked on their own.
    Returns float32 [*shape]. Raises OptionError for a density outside (0, 1] or a gamma outside
    [0, 1), or weights to divide by that sum to zero. Davari and Belilovsky 2023, arXiv:2312.06795,
    in the terms of mergekit: the paper's β is 1 − density − γ, counted in each layer as here.

    Options:
        density: fraction of entries that stay, in (0, 1]; 1 keeps all; or one per member
        gamma: fraction of entries, the largest, that go first, in [0, 1); or one per member
        scale: λ on the sum; the paper has 0.3 for several members
        normalise: divide the sum by Σ wᵢ
    """
    start = widened(wanted_base("breadcrumbs", base))
    changes = masked("breadcrumbs", tensors, start, measured, key, density, gamma)
    return with_sum("breadcrumbs", changes, weight, key, normalise=normalise, scale=scale)


def masked(
    strategy: str, tensors: Sequence[Tensor], start: Tensor, measured: Sequence[Seen],
    key: str, density: PerMember, gamma: PerMember,
) -> Changes:
    """The task vectors without their largest and smallest entries."""
    stay = densities(strategy, density, len(tensors), key)
    gone = for_members(gamma, len(tensors))
    for member, fraction in enumerate(gone):
        if not 0 <= fraction < 1:
            raise OptionError(strategy, f"gamma is {fraction}{whose(gone, member, key)}, expected "
                              "a fraction in [0, 1)")
    places = _places(stay, gone)
    if min(stay) == 1:
        return Changes(start, tensors)
    ends = (at_places(measured, places) if measured else
            at_places_of(magnitudes(start, *tensors), places))
    return Changes(start, tensors, ends=[(least, most) for least, most in ends])


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    shape: Sequence[int],
    measured: Sequence[Seen],
    density: PerMember,
    gamma: PerMember,
) -> Seen | None:
    """A slice's part in finding the least and the most |τ| of each member that stay."""
    stay = for_members(density, len(tensors))
    if min(stay) == 1 or is_small(tensors[0], shape):
        return None
    start = widened(wanted_base("breadcrumbs", base))
    return look(magnitudes, (start, *tensors), measured,
                _places(stay, for_members(gamma, len(tensors))), note=note_magnitudes,
                whole=is_whole(tensors[0], shape))


def _places(density: Sequence[float], gamma: Sequence[float]) -> Places:
    """Where in the order of magnitudes the band of each member ends and begins."""

    def band(size: int, row: int) -> list[int]:
        stay = int(density[row] * size)
        gone = min(int(gamma[row] * size), size - stay)
        return [gone + stay, gone + 1] if stay else [0, 0]

    return band
