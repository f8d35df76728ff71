"""Temperatures by the likelihood of held-out data: Guo et al. 2017, "On calibration of modern
neural networks", arXiv:1706.04599."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Temperatures lie between 1/100 and 100.
LIMIT = 100.0


def likeliest_temperatures(logits: Tensor, labels: Tensor) -> Tensor:
    """One temperature [M] for each member, never less likely than 1.

    logits: float64 [M, N, C]. labels: int64 [N].
    """
    true = at_labels(logits, labels)
    found = bounded(descend(
        lambda free: -log_likelihood(logits, true, bounded(free)).mean(1).sum(),
        torch.zeros(len(logits), dtype=torch.float64)))
    one = torch.ones_like(found)
    gain = (log_likelihood(logits, true, found) - log_likelihood(logits, true, one)).mean(1)
    return torch.where(gain > 0, found, one)


def at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """What logits [M, N, C] say of the labels [N], [M, N]."""
    return logits.gather(2, labels.expand(len(logits), -1)[..., None])[..., 0]


def log_likelihood(logits: Tensor, true: Tensor, temperatures: Tensor) -> Tensor:
    """log softmax(z / T) at the true label, [M, N]. true: its logit [M, N]. temperatures: [M]."""
    scaled = logits / temperatures[:, None, None]
    return true / temperatures[:, None] - scaled.logsumexp(2)


def bounded(free: Tensor) -> Tensor:
    """Any number to a temperature; 0 to 1."""
    return torch.pow(LIMIT, free.tanh())


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 200) -> Tensor:
    """Where L-BFGS gets from here."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], max_iter=steps, tolerance_grad=1e-7,
                                  tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return point.detach()
