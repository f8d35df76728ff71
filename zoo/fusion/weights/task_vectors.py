"""What the methods on task vectors τᵢ = θᵢ − θ₀ share: task vectors, trims, elections of signs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.fusion import compiled
from zoo.fusion.precision import widened
from zoo.fusion.randomness import keys_of
from zoo.fusion.weights.masks import STEPS, even_mask
from zoo.fusion.weights.selection import SMALL
from zoo.options import PerMember

Convention: TypeAlias = Literal["paper", "mergekit"]
Election: TypeAlias = Literal["sum", "count", "unweighted"]
_ELECTIONS = ("sum", "count", "unweighted")  # in the order of the kernels
_LEAST = 2.0**-149  # above zero in float32


def task_vectors(tensors: Iterable[Tensor], start: Tensor) -> Iterator[Tensor]:
    """Each τᵢ, in float32 at least, as a tensor of its own that may be changed in place."""
    for tensor in tensors:
        yield widened(tensor) - start


@dataclass(frozen=True, slots=True)
class Changes:
    """Task vectors as a fusion takes them: trimmed, dropped from at random, and rescaled.

    start: θ₀, [*shape] like the tensors. ready: the tensors are task vectors, the fusion's own.
    ends: the least and the most magnitude that stay, of each member. chances: with which an entry
    of each member stays, in steps of 2⁻¹⁶, as the stream (seed, key) decides from `offset` on;
    where it is below 1, what stays is multiplied by the factor. varying: the least `variance` over
    the members of entries that stay; -1 for all.
    Iterating gives tensors of their own that may be changed in place.
    """

    start: Tensor
    tensors: Sequence[Tensor]
    _: KW_ONLY
    ready: bool = False
    ends: Sequence[tuple[float, float]] | None = None
    chances: Sequence[float] | None = None
    factors: Sequence[float] = ()
    stream: tuple[object, ...] = ()
    offset: int = 0
    varying: float = -1

    def __iter__(self) -> Iterator[Tensor]:
        chosen = (variance(self.tensors).ge_(self.varying).to(self.start.dtype)
                  if self.varying >= 0 else None)
        vectors = self.tensors if self.ready else task_vectors(self.tensors, self.start)
        for member, vector in enumerate(vectors):
            if self.ends:
                least, most = self.ends[member]
                vector = without_largest(trimmed(vector, least), most)
            if self.chances and self.chances[member] < 1:
                kept = even_mask(self.chances[member], (*self.stream, member), self.offset, vector)
                vector.mul_(kept).mul_(self.factors[member])
            yield vector if chosen is None else vector.mul_(chosen)

    def arguments(self, weight: Sequence[float]) -> tuple[Any, ...]:
        """What the kernels want to know of them."""
        members = range(len(self.tensors))
        ends = self.ends or [(0.0, math.inf)] * len(members)
        chances = self.chances or [1.0] * len(members)
        return (
            self.start.data_ptr(),
            np.array([tensor.data_ptr() for tensor in self.tensors]), self.start.numel(),
            self.ready,
            np.array([_below(least, torch.float32) for least, _ in ends], np.float32),
            np.array([most for _, most in ends], np.float32),
            np.array([round(chance * STEPS) for chance in chances]),
            np.array([keys_of((*self.stream, member)) for member in members]), self.offset,
            np.array(self.factors or [1.0] * len(members), np.float32),
            np.array(weight, np.float32))


def variance(tensors: Sequence[Tensor]) -> Tensor:
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


def with_sum(
    strategy: str, changes: Changes, weight: Sequence[float], key: str, *, normalise: bool,
    scale: float,
) -> Tensor:
    """θ₀ + λ times `summed`."""
    kernels = compiled.kernels(changes.start, *changes.tensors)
    whole = sum(weight) if normalise else 1.0
    if kernels is None or whole == 0:
        return changes.start.add(summed(strategy, changes, weight, key, normalise), alpha=scale)
    result = torch.empty_like(changes.start)
    kernels.add_up(*changes.arguments(weight), np.float32(whole), np.float32(scale),
                   result.data_ptr())
    return result


def with_elected(
    changes: Changes, weight: Sequence[float], *, normalise: bool, scale: float,
    election: Election = "sum", floor: float = 0,
) -> Tensor:
    """θ₀ + λ times `elected`."""
    kernels = compiled.kernels(changes.start, *changes.tensors)
    if kernels is None:
        merged = elected(changes, weight, normalise=normalise, election=election, floor=floor)
        return changes.start.add(merged, alpha=scale)
    result = torch.empty_like(changes.start)
    kernels.elect(*changes.arguments(weight), _ELECTIONS.index(election), normalise,
                  np.float32(floor or _floor(weight)), np.float32(scale),
                  np.float32(changes.varying), result.data_ptr())
    return result


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
    election: Election = "sum", floor: float = 0,
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
        # Clamped, -0 would stay, and the sign of the zeros that lerp picks depend on the cuts.
        positive = _add(positive, functional.threshold(vector, 0.0, 0.0))
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
    floor = floor or _floor(weight)
    if floor:
        return merged.div_(agreeing.clamp_min_(floor))
    none = torch.eq(agreeing, 0, out=torch.empty_like(agreeing))
    return merged.div_(agreeing.add_(none))


def _floor(weight: Sequence[float]) -> float:
    """Under which there is only zero, of no votes; 0 where there is no such number."""
    return max(min(filter(None, weight), default=1), _LEAST) if min(weight) >= 0 else 0


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
