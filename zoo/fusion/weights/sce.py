"""SCE: Wan et al. 2024, "FuseChat: knowledge fusion of chat models", arXiv:2408.07990."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion import compiled
from zoo.fusion.precision import doubled, widened
from zoo.fusion.weights.selection import Places, Seen, at_places, at_places_of, look
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.fusion.weights.task_vectors import (
    Changes,
    Convention,
    is_small,
    is_whole,
    variance,
    with_elected,
)

# So many sums are added up side by side, in one order with and without kernels: their blocks.
_LANES = 512


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
    changes = _selected(tensors, start, select_topk, measured)
    squares = measured[-1] if measured else _squares(changes)
    assert isinstance(squares, Tensor)
    size = start.numel() if shape is None else math.prod(shape)
    shares = [share * factor for share, factor
              in zip(_shares(squares / max(size, 1), convention), weight, strict=True)]
    return with_elected(changes, shares, normalise=True, scale=scale, election="unweighted",
                        floor=1e-6 if convention == "mergekit" else 0)


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
                    whole=is_whole(start, shape), note=_note)
        if seen is not None:
            return seen
    return _squares(_selected(tensors, start, select_topk, measured))


def _selected(
    tensors: Sequence[Tensor], start: Tensor, select_topk: float, measured: Sequence[Seen | Tensor]
) -> Changes:
    """The task vectors, zero where the members differ least."""
    if select_topk == 1:
        return Changes(start, tensors)
    places = _places(select_topk)
    seen = _selecting(measured)
    (least,), = at_places(seen, places) if seen else at_places_of(_varying(*tensors), places)
    return Changes(start, tensors, varying=least)


def _varying(*tensors: Tensor) -> list[Tensor]:
    """The variances that are not zero, one row."""
    array = variance(tensors).flatten().cpu().numpy()
    there = array != 0
    return [torch.from_numpy(array if there.all() else array[there])]


def _note(
    kernels: ModuleType, tensors: Sequence[Tensor], row: int, low: np.float32, high: np.float32,
    inside: NDArray[np.float32],
) -> tuple[int, int, int]:
    members = np.array([tensor.data_ptr() for tensor in tensors])
    found: tuple[int, int, int] = kernels.note_variances(members, tensors[0].numel(), low, high,
                                                         inside)
    return found


def _places(select_topk: float) -> Places:
    return lambda size, row: [int(select_topk * size)]


def _selecting(measured: Sequence[Seen | Tensor]) -> list[Seen]:
    return [each for each in measured if isinstance(each, Seen)]


def _squares(changes: Changes) -> Tensor:
    """‖τ̂ᵢ‖², float64 [M]."""
    kernels = compiled.kernels(changes.start, *changes.tensors)
    if kernels is None:
        return torch.stack([_sum_of_squares(vector) for vector in changes])
    sums = np.zeros((len(changes.tensors), _LANES))
    members = np.array([tensor.data_ptr() for tensor in changes.tensors])
    kernels.add_squares(changes.start.data_ptr(), members, changes.start.numel(),
                        np.float32(changes.varying), sums)
    return torch.from_numpy(sums.sum(1))


def _sum_of_squares(vector: Tensor) -> Tensor:
    """‖τ̂‖², float64 []; on the CPU added up as the kernels do. vector: is changed."""
    vector.square_()
    if vector.device.type != "cpu":
        return doubled(vector).sum()
    squares = vector.detach().flatten().numpy()
    whole = len(squares) // _LANES * _LANES
    sums = squares[:whole].reshape(-1, _LANES).sum(0, dtype=np.float64)
    sums[:len(squares) - whole] += squares[whole:]
    return torch.from_numpy(sums[None].sum(1))[0]


def _shares(squares: Tensor, convention: Convention) -> list[float]:
    """cᵢ without wᵢ, from the mean squares [M]."""
    whole = squares.sum().item()
    if whole < (1e-6 if convention == "mergekit" else 1e-300):
        return [1 / len(squares)] * len(squares)
    return (squares / whole).tolist()
