"""Classifiers are fused by label name: row 3 of one member need not be row 3 of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion.planning import check_classes


def align_heads(
    states: Sequence[Mapping[str, Tensor]],
    classes: Sequence[Sequence[str]],
    keys: Collection[str],
    *,
    strategy: str,
) -> list[dict[str, Tensor]]:
    """The states with the classifiers' rows in the order of the first member's labels.

    states: one per member. classes: the label names of each. keys: the classifier's tensors, each
    [classes, ...]. Tensors that need no change are the same objects. Raises FusionError when
    the labels are not the same set, or cannot be told apart, and ShapeMismatch when a
    classifier has another number of rows than there are labels.
    """
    names = [f"member {number}" for number in range(1, len(states) + 1)]
    check_classes(strategy, names, classes)
    return [_permuted(state, labels, classes[0], keys, strategy)
            for state, labels in zip(states, classes, strict=True)]


def join_heads(
    states: Sequence[Mapping[str, Tensor]],
    classes: Sequence[Sequence[str]],
    keys: Collection[str],
    *,
    strategy: str,
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """One classifier for all labels of members that know different ones: each label's row is the
    mean over the members that know it.

    Arguments and errors: see `align_heads`. Returns the labels, in the order in which they first
    occur, and the classifier's tensors [labels, ...].
    """
    union = tuple(dict.fromkeys(label for labels in classes for label in labels))
    joined = {}
    for key in keys:
        total = torch.zeros(len(union), *states[0][key].shape[1:], dtype=torch.float64,
                            device=states[0][key].device)
        known = torch.zeros(len(union), dtype=torch.float64, device=total.device)
        for state, labels in zip(states, classes, strict=True):
            rows = torch.tensor([union.index(label) for label in labels], device=total.device)
            _want_rows(strategy, key, state, labels)
            total.index_add_(0, rows, state[key].detach().to(total.device, torch.float64))
            known.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))
        shape = (-1, *([1] * (total.ndim - 1)))
        joined[key] = (total / known.view(shape)).to(states[0][key].dtype)
    return union, joined


def align_base(
    base: Mapping[str, Tensor],
    base_classes: Sequence[str],
    classes: Sequence[str],
    keys: Collection[str],
    *,
    strategy: str,
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The base in the order of the members' labels, and the keys that have no base.

    A base that knows other labels (ImageNet's) loses its classifier: the members' are then
    averaged, as a difference to it would mean nothing. base_classes, classes: label names of the
    base and of the aligned members. keys: the classifier's tensors. Raises as `align_heads`.
    """
    if set(base_classes) != set(classes):
        return {key: tensor for key, tensor in base.items() if key not in keys}, frozenset(keys)
    return _permuted(base, base_classes, classes, keys, strategy), frozenset()


def _permuted(
    state: Mapping[str, Tensor],
    labels: Sequence[str],
    wanted: Sequence[str],
    keys: Collection[str],
    strategy: str,
) -> dict[str, Tensor]:
    for key in keys:
        _want_rows(strategy, key, state, labels)
    if tuple(labels) == tuple(wanted):
        return dict(state)
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise FusionError(strategy, f"the label {twice[0]!r} names several classes and the "
                          "members order their labels differently", "Give each class its own name")
    row_of = {label: row for row, label in enumerate(labels)}
    order = torch.tensor([row_of[label] for label in wanted])
    return {key: tensor[order.to(tensor.device)] if key in keys else tensor
            for key, tensor in state.items()}


def _want_rows(
    strategy: str, key: str, state: Mapping[str, Tensor], labels: Sequence[str]
) -> None:
    rows = state[key].shape[0]
    if rows != len(labels):
        raise ShapeMismatch(strategy, key, f"has {rows} rows for {len(labels)} labels",
                            "Give each member the names of all its labels")
