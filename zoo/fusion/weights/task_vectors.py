"""What the methods on task vectors τᵢ = θᵢ − θ₀ share: task vectors, trims, elections of signs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.precision import widened
from zoo.fusion.weights.selection import SMALL
from zoo.options import PerMember

Convention: TypeAlias = Literal["paper", "mergekit"]


def task_vectors(tensors: Iterable[Tensor], start: Tensor) -> Iterator[Tensor]:
    """Each τᵢ, in float32 at least, as a tensor of its own that may be changed in place."""
    for tensor in tensors:
        yield widened(tensor) - start


def magnitudes(start: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each |τᵢ| in float32, which decides what a trim keeps."""
    return [vector.abs_().float() for vector in task_vectors(tensors, start)]


def is_whole(tensor: Tensor, shape: Sequence[int] | None) -> bool:
    """Whether a slice of a tensor of this shape is all of it."""
    return shape is None or tensor.numel() == math.prod(shape)


def is_small(tensor: Tensor, shape: Sequence[int] | None) -> bool:
    """Whether a slice is all of a tensor that is not worth passes: the merge sees it whole too."""
    return tensor.numel() <= SMALL and is_whole(tensor, shape)


def trimmed(vector: Tensor, least: float) -> Tensor:
    """The entries of at least this magnitude, the others zero."""
    return torch.hardshrink(vector, _below(least, vector.dtype))


def without_largest(vector: Tensor, most: float) -> Tensor:
    """The entries of at most this magnitude, the others zero. vector: is changed."""
    if most == math.inf:
        return vector
    if vector.dtype != torch.float32:
        most = (most + _next(most, math.inf)) / 2
    return vector.sub_(torch.hardshrink(vector, most))


def _below(least: float, dtype: torch.dtype) -> float:
    """The largest magnitude that is not at least `least` when it is rounded to float32."""
    if least == math.inf:
        return least
    before = _next(least, -math.inf)
    return before if dtype == torch.float32 else (before + least) / 2


def _next(value: float, towards: float) -> float:
    """The float32 beside this one."""
    return float(np.nextafter(np.float32(value), np.float32(towards)))


def summed(
    strategy: str, vectors: Iterable[Tensor], weight: Sequence[float], key: str, normalise: bool
) -> Tensor:
    """Σ wᵢτᵢ, divided by Σ wᵢ where asked. vectors: each [*shape]; they are changed. Raises
    OptionError when the weights to divide by sum to zero."""
    total: Tensor | None = None
    for vector, share in zip(vectors, weight, strict=True):
        total = vector.mul_(share) if total is None else total.add_(vector, alpha=share)
    assert total is not None
    whole = sum(weight)
    if normalise and whole == 0:
        raise OptionError(
            strategy, f"the weights {list(weight)} of {key!r} sum to zero; set normalise=False")
    return total.div_(whole) if normalise else total


def l1_norms(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ|τ| and Σ|mτ| of task vectors and their masks, which are changed: float64 [M, 2]."""
    return torch.stack([
        torch.stack([vector.abs_().sum(), mask.mul_(vector).sum()]).double()
        for vector, mask in pairs])


def l1_factors(norms: Tensor) -> list[float]:
    """What gives each masked task vector its L1 norm back; 1 where either norm is below 1e-7."""
    return [whole / kept if whole >= 1e-7 and kept >= 1e-7 else 1.0
            for whole, kept in norms.tolist()]


def elected(
    vectors: Iterable[Tensor], weight: Sequence[float], *, normalise: bool,
    election: Literal["sum", "count", "unweighted"] = "sum", floor: float = 0,
) -> Tensor:
    """Elect a sign for each entry, and add up the weighted entries that have it.

    The sign is that of Σ wᵢτᵢ ("sum"), of the number of positive less that of negative wᵢτᵢ
    ("count"), or of Σ τᵢ ("unweighted"); a sum of exactly zero counts as +. An entry of zero has
    neither sign. vectors: each [*shape]; they are changed. normalise: divide by the weights of
    those that agree, which count as at least the floor, or as 1 where they add up to zero.
    """
    total = positive = ballot = share_positive = share_negative = None
    for vector, share in zip(vectors, weight, strict=True):
        if election == "unweighted":
            ballot = vector.clone() if ballot is None else ballot.add_(vector)
        if share != 1:
            vector.mul_(share)
        if election == "count":
            ballot = _add(ballot, vector.sign())
        positive = _add(positive, vector.clamp_min(0))
        if normalise:
            # Compared into floats: into bools it takes four times as long.
            for_positive = torch.gt(vector, 0, out=torch.empty_like(vector))
            for_negative = torch.lt(vector, 0, out=torch.empty_like(vector))
            share_positive = _add(share_positive, for_positive, share)
            share_negative = _add(share_negative, for_negative, share)
        total = _add(total, vector)
    assert total is not None
    assert positive is not None
    negative = total - positive
    plus = (total if ballot is None else ballot).ge_(0)
    # With weights of exactly 0 and 1 this picks; torch.where takes twenty times as long.
    merged = torch.lerp(negative, positive, plus)
    if share_positive is None or share_negative is None:
        return merged
    agreeing = torch.lerp(share_negative, share_positive, plus)
    if not floor and min(weight) >= 0:
        floor = min(filter(None, weight), default=1)  # under it there is only zero, of no votes
    if floor:
        return merged.div_(agreeing.clamp_min_(floor))
    none = torch.eq(agreeing, 0, out=torch.empty_like(agreeing))
    return merged.div_(agreeing.add_(none))


def _add(total: Tensor | None, part: Tensor, factor: float = 1) -> Tensor:
    if total is None:
        return part if factor == 1 else part.mul_(factor)
    return total.add_(part, alpha=factor)


def densities(strategy: str, density: PerMember, members: int, key: str) -> list[float]:
    """The density of each member. Raises OptionError for one outside of (0, 1]."""
    values = for_members(density, members)
    for member, value in enumerate(values):
        if not 0 < value <= 1:
            raise OptionError(strategy, f"density is {value}{whose(values, member, key)}, expected "
                              "a fraction in (0, 1]")
    return values


def whose(values: Sequence[object], member: int, key: str) -> str:
    """Which member has a value, and in which tensor, for a message; nothing where all have it."""
    return f" for member {member + 1} in {key!r}" if len(set(values)) > 1 else ""


def for_members(option: PerMember, members: int) -> list[float]:
    """One number per member, of an option that may be one for all."""
    return [option] * members if isinstance(option, int | float) else list(option)
