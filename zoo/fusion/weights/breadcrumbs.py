"""Model Breadcrumbs: Davari and Belilovsky 2023, "Model Breadcrumbs: scaling multi-task model
merging with sparse masks", arXiv:2312.06795."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.selection import Places, Seen, at_places, at_places_of, look
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    check_density,
    is_small,
    is_whole,
    magnitudes,
    summed,
    task_vectors,
    trimmed,
    without_largest,
)


def breadcrumbs(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Seen] = (),
    density: float = 0.15,
    gamma: float = 0.01,
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
        density: fraction of entries that stay, in (0, 1]; 1 keeps all
        gamma: fraction of entries, the largest, that go first, in [0, 1)
        scale: λ on the sum; the paper has 0.3 for several members
        normalise: divide the sum by Σ wᵢ
    """
    start = widened(wanted_base("breadcrumbs", base))
    vectors = masked("breadcrumbs", tensors, start, measured, density, gamma)
    return start.add(summed("breadcrumbs", vectors, weight, key, normalise), alpha=scale)


def masked(
    strategy: str, tensors: Sequence[Tensor], start: Tensor, measured: Sequence[Seen],
    density: float, gamma: float,
) -> Iterator[Tensor]:
    """The task vectors without their largest and smallest entries."""
    check_density(strategy, density)
    if not 0 <= gamma < 1:
        raise OptionError(strategy, f"gamma is {gamma}, expected a fraction in [0, 1)")
    places = _places(density, gamma)
    ends = [[0.0, float("inf")]] * len(tensors)
    if density < 1:
        ends = (at_places(measured, places) if measured else
                [at_places_of(row, places) for row in magnitudes(start, *tensors)])
    for vector, (least, most) in zip(task_vectors(tensors, start), ends, strict=True):
        yield without_largest(trimmed(vector, least), most)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    shape: Sequence[int],
    measured: Sequence[Seen],
    density: float,
    gamma: float,
) -> Seen | None:
    """A slice's part in finding the least and the most |τ| of each member that stay."""
    if density == 1 or is_small(tensors[0], shape):
        return None
    start = widened(wanted_base("breadcrumbs", base))
    return look(magnitudes, (start, *tensors), measured, _places(density, gamma),
                whole=is_whole(tensors[0], shape))


def _places(density: float, gamma: float) -> Places:
    """Where in the order of magnitudes the band ends and begins."""

    def band(size: int) -> list[int]:
        stay = int(density * size)
        gone = min(int(gamma * size), size - stay)
        return [gone + stay, gone + 1] if stay else [0, 0]

    return band
