"""Losses of a classifier by name: mean over a batch of logits [B, C] and labels [B]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import OptionError
from zoo.names import suggest

LOSSES = ("cross_entropy", "focal", "bce")
_FOCUS = 2.0


def criterion(name: str, label_smoothing: float = 0.0) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of this name. focal: Lin et al. 2017, arXiv:1708.02002, with γ = 2; bce: one
    sigmoid per class, Wightman et al. 2021, arXiv:2110.00476.

    label_smoothing: share of the label spread over all classes, in [0, 1). Raises OptionError.
    """
    if not 0 <= label_smoothing < 1:
        raise OptionError("transfer", f"label_smoothing is {label_smoothing}, expected [0, 1)")
    if name not in LOSSES:
        near = suggest(name, LOSSES)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError("transfer", f"no loss is called {name!r}{hint}", LOSSES)

    def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)

    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        losses = functional.cross_entropy(
            logits, labels, label_smoothing=label_smoothing, reduction="none")  # (B,)
        true = functional.softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)
        return ((1 - true) ** _FOCUS * losses).mean()

    def bce(logits: Tensor, labels: Tensor) -> Tensor:
        classes = logits.shape[1]
        wanted = torch.full_like(logits, label_smoothing / classes)
        wanted.scatter_(1, labels[:, None], 1 - label_smoothing + label_smoothing / classes)
        return functional.binary_cross_entropy_with_logits(logits, wanted)

    return {"cross_entropy": cross_entropy, "focal": focal, "bce": bce}[name]
