"""SCE: Wan et al. 2024, "FuseChat: knowledge fusion of chat models", arXiv:2408.07990."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.selection import Places, Seen, at_places, at_places_of, look
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    Convention,
    elected,
    is_small,
    is_whole,
    task_vectors,
)


def sce(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Seen | Tensor] = (),
    shape: Sequence[int] | None = None,
    select_topk: float = 0.1,
    scale: float = 1.0,
    convention: Literal["paper", "mergekit"] = "paper",
) -> Tensor:
    """Select the entries where the members differ most, weigh the members by what they changed
    there, erase the minority of signs: θ₀ + λ Σ cᵢτ̂ᵢ / Σ cᵢ over those with the sign of Σ τ̂ᵢ.

    Selected are, of a tensor's entries with a variance over the members that is not zero, the
    fraction with the largest; τ̂ᵢ is zero elsewhere. cᵢ = wᵢ‖τ̂ᵢ‖² / Σ ‖τ̂ⱼ‖².

    tensors: one per member, each [*shape]. base: θ₀ [*shape]. weight: w, one per member. measured:
    the sums of `measure` over the tensor; without them these entries stand for themselves. shape:
    the whole tensor's. Returns float32 [*shape]. Raises OptionError for a select_topk outside
    (0, 1]. Wan et al. 2024, arXiv:2408.07990.

    Options:
        select_topk: fraction of the entries that differ to select, in (0, 1]; 1 is all entries
        scale: λ on the merged task vector
        convention: as it stands ("paper"), or with equal cᵢ where the mean squares of all τ̂ᵢ add
            up to less than 1e-6, and with Σ cᵢ at least 1e-6 ("mergekit")
    """
    if not 0 < select_topk <= 1:
        raise OptionError("sce", f"select_topk is {select_topk}, expected a fraction in (0, 1]")
    start = widened(wanted_base("sce", base))
    vectors = list(_selected(tensors, start, select_topk, measured))
    squares = measured[-1] if measured else _squares(vector.clone() for vector in vectors)
    assert isinstance(squares, Tensor)
    size = start.numel() if shape is None else math.prod(shape)
    shares = [share * factor for share, factor
              in zip(_shares(squares / max(size, 1), convention), weight, strict=True)]
    merged = elected(vectors, shares, normalise=True, election="unweighted",
                     floor=1e-6 if convention == "mergekit" else 0)
    return start.add(merged, alpha=scale)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    shape: Sequence[int],
    measured: Sequence[Seen | Tensor],
    select_topk: float,
) -> Seen | Tensor | None:
    """A slice's part in finding the least variance that is selected, and then in the ‖τ̂ᵢ‖²,
    float64 [M]."""
    if is_small(tensors[0], shape) or (measured and isinstance(measured[-1], Tensor)):
        return None
    start = widened(wanted_base("sce", base))
    if select_topk < 1:
        seen = look(_varying, tensors, _selecting(measured), _places(select_topk),
                    whole=is_whole(start, shape))
        if seen is not None:
            return seen
    return _squares(_selected(tensors, start, select_topk, measured))


def _selected(
    tensors: Sequence[Tensor], start: Tensor, select_topk: float, measured: Sequence[Seen | Tensor]
) -> Iterator[Tensor]:
    """The task vectors, zero where the members differ least."""
    if select_topk == 1:
        yield from task_vectors(tensors, start)
        return
    places = _places(select_topk)
    seen = _selecting(measured)
    least = (at_places(seen, places) if seen else at_places_of(_varying(*tensors), places))[0][0]
    variance = _variance(tensors)
    chosen = variance.ge_(least).to(start.dtype)
    for vector in task_vectors(tensors, start):
        yield vector.mul_(chosen)


def _variance(tensors: Sequence[Tensor]) -> Tensor:
    """Of each entry over the members, times their number, float32 [*shape].

    Taken from the differences from the first member, which a large weight in all of them does not
    make less exact.
    """
    first = widened(tensors[0])
    if len(tensors) == 1:
        return torch.zeros_like(first).float()
    total = widened(tensors[1]) - first
    squares = total.square()
    for tensor in tensors[2:]:
        off = widened(tensor) - first
        squares.addcmul_(off, off)
        total.add_(off)
    return squares.addcmul_(total, total, value=-1 / len(tensors)).float()


def _varying(*tensors: Tensor) -> list[Tensor]:
    """The variances that are not zero, one row."""
    array = _variance(tensors).flatten().cpu().numpy()
    there = array != 0
    return [torch.from_numpy(array if there.all() else array[there])]


def _places(select_topk: float) -> Places:
    return lambda size, row: [int(select_topk * size)]


def _selecting(measured: Sequence[Seen | Tensor]) -> list[Seen]:
    return [each for each in measured if isinstance(each, Seen)]


def _squares(vectors: Iterable[Tensor]) -> Tensor:
    """‖τ̂ᵢ‖², float64 [M]. vectors: are changed."""
    return torch.stack([vector.square_().sum().double() for vector in vectors])


def _shares(squares: Tensor, convention: Convention) -> list[float]:
    """cᵢ without wᵢ, from the mean squares [M]."""
    whole = squares.sum().item()
    if whole < (1e-6 if convention == "mergekit" else 1e-300):
        return [1 / len(squares)] * len(squares)
    return (squares / whole).tolist()
