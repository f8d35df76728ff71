"""TIES: Yadav et al. 2023, "TIES-Merging: resolving interference when merging models",
arXiv:2306.01708.

The trim needs the k-th largest |τ|, of the flattened model in the paper and of each tensor in
mergekit. A non-negative float32 sorts like its bits, so two histograms find it exactly without
sorting: one of the upper 16 bits, then one of the lower 16 inside the bin that holds it. Their
counts can be added up over tensors: that is what `measure` is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.task_arithmetic import wanted_base

BINS = 1 << 16


def ties(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    key: str,
    weight: Sequence[float],
    measured: Sequence[Tensor] = (),
    density: float = 0.2,
    scale: float = 1.0,
    convention: Literal["paper", "mergekit"] = "paper",
    normalise: bool = True,
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
        density: fraction of entries that the trim keeps, in (0, 1]
        scale: λ on the merged task vector
        convention: trim over the flattened model ("paper") or each tensor ("mergekit")
        normalise: divide by the weights of the members that agree; off, they are summed
    """
    _check(density)
    start = widened(wanted_base("ties", base))
    vectors = [widened(tensor) - start for tensor in tensors]
    if density < 1:
        while len(measured) < 2:
            measured = (*measured, _histogram(vectors, measured, density))
        vectors = [
            torch.where(vector.abs().float() >= least, vector, 0)
            for vector, least in zip(vectors, _thresholds(measured, density), strict=True)
        ]
    votes = [vector * w for vector, w in zip(vectors, weight, strict=True)]
    elected = sum(votes[1:], votes[0]) >= 0
    merged, agreeing = torch.zeros_like(start), torch.zeros_like(start)
    for vote, w in zip(votes, weight, strict=True):
        agrees = torch.where(elected, vote > 0, vote < 0)
        merged += vote * agrees
        agreeing += agrees * w
    if normalise:
        merged /= torch.where(agreeing == 0, 1, agreeing)
    return start.add(merged, alpha=scale)


def measure(
    tensors: Sequence[Tensor],
    *,
    base: Tensor | None,
    measured: Sequence[Tensor],
    density: float,
) -> Tensor | None:
    """A slice's part in the next histogram over the model or the tensor, int64 [members, 65536].

    measured: the histograms that are complete. Returns None when nothing is left to count.
    """
    _check(density)
    if density == 1 or len(measured) == 2:
        return None
    start = widened(wanted_base("ties", base))
    return _histogram([widened(tensor) - start for tensor in tensors], measured, density)


def _histogram(
    vectors: Sequence[Tensor], measured: Sequence[Tensor], density: float
) -> Tensor:
    """How often each upper half of |τ|'s bits occurs; once that is measured, each lower half
    below the upper half of the k-th largest."""
    upper = _locate(measured[0], _rank(measured[0], density))[0] if measured else None
    counts = []
    for member, vector in enumerate(vectors):
        bits = vector.abs().float().view(torch.int32).flatten()
        halves = bits >> 16
        if upper is not None:
            halves = bits[halves == upper[member]] & (BINS - 1)
        counts.append(torch.bincount(halves, minlength=BINS))
    return torch.stack(counts)  # (M, BINS)


def _thresholds(measured: Sequence[Tensor], density: float) -> Tensor:
    """Each member's k-th largest |τ|, float32 [M]."""
    upper, rank = _locate(measured[0], _rank(measured[0], density))
    lower, _ = _locate(measured[1], rank)
    return (upper << 16 | lower).int().view(torch.float32)


def _rank(counts: Tensor, density: float) -> Tensor:
    """Where the k-th largest stands in ascending order, from 1, for each member [M]."""
    entries = int(counts[0].sum())  # the same for all: their tensors have the same shapes
    return torch.full_like(counts[:, 0], entries - max(1, int(density * entries)) + 1)


def _locate(counts: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds the entry of this rank, and its rank inside the bin, each [M]."""
    reached = counts.cumsum(1)  # (M, BINS)
    bins = torch.searchsorted(reached, rank[:, None])  # (M, 1)
    before = reached.gather(1, bins) - counts.gather(1, bins)
    return bins[:, 0], rank - before[:, 0]


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise OptionError("ties", f"density is {density}, expected a fraction in (0, 1]")
