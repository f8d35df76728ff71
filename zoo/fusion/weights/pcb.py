"""PCB-Merging: Du et al. 2024, "Parameter competition balancing for model merging",
arXiv:2410.02396."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.selection import (
    Places,
    Seen,
    at_places,
    at_places_of,
    complete,
    divided,
    look,
    magnitudes,
    note_magnitudes,
)
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import task_vectors

# The least and the most of something for each member.
Ends: TypeAlias = Sequence[Sequence[float]]

# The fraction of magnitudes that are clamped at each end.
_OUTLIERS = 1e-4


def pcb(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Seen] = (),
    ratio: float = 0.1,
    scale: float = 1.0,
) -> Tensor:
    """θ₀ + λ Σ wᵢβ̂ᵢτᵢ / Σ β̂ᵢ, where β̂ᵢ says how much an entry of member i counts.

    βᵢ = exp(k·nᵢ²) · tanh(τᵢ·Σⱼτⱼ): how large the entry is in its own member, nᵢ being |τᵢ| from
    its least (0) to its most (1), and how far the others agree with it. β̂ᵢ is βᵢ from the value
    that the fraction `ratio` of entries reaches (0, as all below) to its most (1). Least, most and
    ratio are over the flattened model, and the 1e-4 smallest and largest |τᵢ| are clamped.

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. measured:
    the sums of `measure` over the model; without them these entries stand for themselves. Returns
    float32 [*shape]. Raises OptionError for a ratio outside (0, 1]. Du et al. 2024,
    arXiv:2410.02396, in the form of the code that the authors released with it.

    Options:
        ratio: fraction of each member's entries that count, in (0, 1]
        scale: λ on the merged task vector
    """
    if not 0 < ratio <= 1:
        raise OptionError("pcb", f"ratio is {ratio}, expected a fraction in (0, 1]")
    start = widened(wanted_base("pcb", base))
    first, second = divided(measured, _outer) if measured else ((), ())
    sizes = (at_places(first, _outer) if first else
             at_places_of(magnitudes(start, *tensors), _outer))
    balances = _balances(sizes, start, *tensors)
    counted = (at_places(second, _counting(ratio)) if second else
               at_places_of(balances, _counting(ratio)))
    merged, whole = torch.zeros_like(start), torch.zeros_like(start)
    for vector, balance, (small, large), (least, most), share in zip(
            task_vectors(tensors, start), balances, sizes, counted, weight, strict=True):
        counts = balance.clamp_min_(least).sub_(least).div_((most - least) or 1).to(start.dtype)
        clamped = vector.sign() * vector.abs().clamp_(small, large)
        merged.addcmul_(clamped, counts, value=share)
        whole.add_(counts)
    return start.add(merged.div_(whole.clamp_min_(1e-12)), alpha=scale)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    measured: Sequence[Seen],
    ratio: float,
) -> Seen | None:
    """A slice's part in finding the least and the most |τᵢ| of each member, then of βᵢ."""
    start = widened(wanted_base("pcb", base))
    first, second = divided(measured, _outer) if measured else ((), ())
    if not first or not complete(first, _outer):
        return look(magnitudes, (start, *tensors), first, _outer, note=note_magnitudes)
    return look(partial(_balances, at_places(first, _outer)), (start, *tensors), second,
                _counting(ratio))


def _balances(sizes: Ends, start: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each βᵢ, float32. sizes: the least and the most |τᵢ|."""
    vectors = [vector.float() for vector in task_vectors(tensors, start)]
    total = torch.zeros_like(vectors[0])
    for vector in vectors:
        total.add_(vector)
    return [
        vector.abs().clamp_(small, large).sub_(small).div_((large - small) or 1)
        .square_().mul_(len(vectors)).exp_().mul_((vector * total).tanh_())
        for vector, (small, large) in zip(vectors, sizes, strict=True)]


def _outer(size: int, row: int) -> list[int]:
    return [size - int(size * _OUTLIERS), size - int(size * (1 - _OUTLIERS) - 1)]


def _counting(ratio: float) -> Places:
    return lambda size, row: [size - int(size * (1 - ratio)), 1]
