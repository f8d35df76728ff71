"""Labels: which unit each element of a tensor belongs to.

Labels are int64 tensors shaped like the tensors that they describe. A positive label is a unit: a
channel, a hidden neuron, a whole attention head. A negative label is an element that stays where
it is (an input pixel, a constant), each with a number of its own. Axes along which labels are all
equal are kept expanded (stride 0), so most label tensors are as small as the number of channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def core(labels: Tensor) -> Tensor:
    """The labels without what expanded axes repeat."""
    for axis, (length, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if length > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def is_one_number(this: Tensor, that: Tensor) -> bool:
    """Whether `this` is one number for all that varies in `that`."""
    small = core(this)
    if small.numel() != 1:
        return False
    varying = [length > 1 for length in core(that).shape]
    lengths = [1] * (that.dim() - this.dim()) + list(this.shape)
    return int(small) < 0 or all(
        length == 1 for length, varies in zip(lengths, varying, strict=True) if varies)


def repeated(this: Tensor, that: Tensor, both: torch.Size) -> list[int]:
    """The axes of both along which broadcasting repeats `this`, and `that` has more."""
    return [axis for axis in range(-len(both), 0)
            if (axis < -this.dim() or this.shape[axis] == 1)
            and axis >= -that.dim() and that.shape[axis] > 1]


def spread(a: Tensor, b: Tensor, axes: Sequence[int]) -> set[int]:
    """The units of `a` each of whose elements meets all the units of `b` that the unit meets.

    a, b: labels in one shape; a is repeated along the axes.
    """
    if not axes:
        return set()
    rest = [axis for axis in range(-a.dim(), 0) if axis not in axes]
    order = [axis % a.dim() for axis in (*rest, *axes)]
    shape = (-1, torch.Size(a.shape[axis] for axis in axes).numel())
    firsts, rows = (labels.permute(order).reshape(shape) for labels in (a, b))
    ordered = rows.sort(dim=1).values
    each = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)  # partners of each element
    names, where = distinct(firsts[:, 0])
    pairs, _ = pairs_of(firsts.flatten(), rows.flatten())
    of: dict[int, int] = defaultdict(int)
    for unit, _ in pairs:
        of[unit] += 1
    least = torch.full_like(names, rows.shape[1]).scatter_reduce(0, where, each, "amin")
    return {unit for unit, count in zip(names.tolist(), least.tolist(), strict=True)
            if unit > 0 and count == of[unit]}


def pairs_of(a: Tensor, b: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """The different pairs of two flat label tensors, and where each stands."""
    (_, i), (names, j) = distinct(a), distinct(b)
    _, where = distinct(i * len(names) + j)
    counts = where.bincount()
    first = where.argsort(stable=True)[counts.cumsum(0) - counts]
    return list(zip(a[first].tolist(), b[first].tolist(), strict=True)), where


def units_in(labels: Tensor) -> list[int]:
    found: list[int] = distinct(core(labels))[0].tolist()
    return [label for label in found if label > 0]


def mixed(labels: Tensor) -> Tensor:
    """Scrambled numbers, which sums of different labels do not share (splitmix64)."""
    words = labels * -7046029254386353131
    words = (words ^ (words >> 30)) * -4658895280553007687
    words = (words ^ (words >> 27)) * -7723592293110705685
    return words ^ (words >> 31)


def distinct(labels: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The different labels (or rows), and which of them stands at each place."""
    found: tuple[Tensor, Tensor] = torch.unique(labels, return_inverse=True, dim=axis)
    return found


def joint_shape(*shapes: Sequence[int]) -> torch.Size:
    """What shapes become by broadcasting."""
    joint: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return joint
