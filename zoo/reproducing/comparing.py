"""Two states of one model, tensor by tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.precision import doubled

_OTHER = "has other numbers"


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what was saved. problem: in words. largest: absolute difference of one
    of its numbers, None where the two cannot be subtracted. saved, found: sha256 of the bytes, None
    where there are none."""

    tensor: str
    problem: str
    largest: float | None = None
    saved: str | None = None
    found: str | None = None


@dataclass(frozen=True)
class Choice:
    """A choice of `auto`, made again. then, now: what was chosen. compared: how many candidates
    were tried on as much both times. differing: in words, those that came out otherwise.
    alone: those that were tried once only. uncertain: in words, why another choice would say
    nothing against the model; then only candidates that were tried alike are compared."""

    then: str
    now: str
    compared: int
    differing: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()

    @property
    def same(self) -> bool:
        """Whether nothing that can be compared differs."""
        return not self.differing and self.compared > 0 and (bool(self.uncertain) or (
            self.then == self.now and not self.alone))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "same": self.same}


@dataclass(frozen=True)
class Reproduction:
    """What came of making a model again.

    exact: tensors that are the same bit for bit. close: those within `tolerance` of the largest
    number of their tensor. differing: those that are not. unchecked: those that nothing could be
    compared with. versions: library → (then, now), where the two differ. notes: what else a reader
    should know. choice: what came of `auto`'s choice, where it was made again.
    """

    reference: str
    exact: int
    close: int
    tolerance: float
    differing: tuple[Difference, ...] = ()
    unchecked: tuple[str, ...] = ()
    versions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    choice: Choice | None = None

    @property
    def reproduced(self) -> bool:
        """Whether every tensor was compared and none differs, nor the choice if it was made
        again."""
        return (not self.differing and not self.unchecked and self.exact + self.close > 0
                and (self.choice is None or self.choice.same))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reproduced": self.reproduced,
                "choice": self.choice and self.choice.as_dict()}


def precision(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """That of all its numbers; None where they have several."""
    found = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else None


def compared(
    saved: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float,
    leave: Collection[str] = (),
) -> tuple[int, int, tuple[Difference, ...]]:
    """How many tensors are the same bit for bit, how many within the tolerance, and what differs.

    tolerance: largest difference of two numbers as a share of the largest number in the saved
    tensor; 0 accepts nothing but the same bits. leave: keys that are not compared.
    """
    exact = close = 0
    differing = []
    for key in sorted((saved.keys() | found.keys()) - set(leave)):
        difference = _difference(key, saved.get(key), found.get(key), tolerance)
        if difference is None:
            exact += 1
        elif difference.problem:
            differing.append(difference)
        else:
            close += 1
    return exact, close, tuple(differing)


def _difference(
    key: str, saved: Tensor | None, found: Tensor | None, tolerance: float
) -> Difference | None:
    """None for the same bits; a problem of `""` for what is within the tolerance."""
    if saved is None or found is None:
        return Difference(key, "is not in the saved model" if saved is None else "was not made")
    if saved.shape != found.shape or saved.dtype != found.dtype:
        return Difference(key, f"is {_said(found)}, and was saved as {_said(saved)}")
    left, right = _bytes(saved), _bytes(found)
    if torch.equal(left, right):
        return None
    hashes = _sha256(left), _sha256(right)
    if saved.is_complex():
        return Difference(key, _OTHER, None, *hashes)
    expected = doubled(saved.detach().cpu())
    largest = float((expected - doubled(found.detach().cpu())).abs().max())
    if saved.is_floating_point() and largest <= tolerance * float(expected.abs().max()):
        return Difference(key, "", largest)
    return Difference(key, _OTHER, largest if math.isfinite(largest) else None, *hashes)


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _sha256(data: Tensor) -> str:
    return hashlib.sha256(data.numpy().data).hexdigest()
