"""AdaMerging: Yang et al. 2024, "AdaMerging: adaptive model merging for multi-task learning",
arXiv:2310.02575."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import DataError, OptionError
from zoo.fusion.candidates import completed, own_keys
from zoo.fusion.weights.task_arithmetic import wanted_base

State = Mapping[str, Tensor]


def adamerging(
    states: Sequence[State],
    *,
    base: State | None,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
    report: dict[str, Any] | None = None,
    per: Literal["tensor", "model"] = "tensor",
    start: float = 0.3,
    steps: int = 100,
    lr: float = 5e-3,
) -> dict[str, Tensor]:
    """θ₀ + Σ λᵢτᵢ with the λ, in [0, 1], that make its answers surest: of least entropy.

    Adam learns the coefficients on unlabelled images, one batch a step; keep these apart from the
    test set, as the method adapts to them. Running statistics are pooled meanwhile. Least entropy
    is no least error: with many steps on few images the network grows sure of its mistakes.

    states: one per member. base: θ₀. weights: by key, one number per member, which multiplies λ.
    report: gets the `coefficients` per member (their mean over the tensors), and the `entropy` of
    the first and the last batch, in nats. Raises OptionError for a start outside [0, 1], negative
    steps or lr, DataError without images.
    Yang et al. 2024, arXiv:2310.02575.

    Options:
        per: a coefficient for each member and "tensor" (the paper's layer-wise), or for each member
            and the "model" (task-wise)
        start: of all coefficients, in [0, 1]
        steps: of Adam, one batch each; the paper takes 500, with an lr of 0.001
        lr: Adam's
    """
    if not 0 <= start <= 1:
        raise OptionError("adamerging", f"start is {start}, expected 0 to 1")
    if steps < 0 or lr < 0:
        raise OptionError("adamerging", f"steps is {steps} and lr {lr}, expected 0 or more")
    origin = wanted_base("adamerging", base)
    vectors = {key: [(state[key] - origin[key]) * share
                     for state, share in zip(states, row, strict=True)]
               for key, row in weights.items()}
    whole = completed({}, states, [1.0] * len(states))
    whole = {key: whole[key] for key in own_keys(module, whole)}
    rows = len(vectors) if per == "tensor" else 1
    device = next(iter(whole.values())).device
    raw = torch.full((rows, len(states)), start, device=device)

    def merged() -> dict[str, Tensor]:
        found = {}
        for row, (key, own) in enumerate(vectors.items()):
            coefficients = raw.clamp(0, 1)[row if per == "tensor" else 0]
            found[key] = origin[key] + sum(
                part * vector for part, vector in zip(coefficients, own, strict=True))
        return found

    entropies = []
    with torch.enable_grad():
        adam = torch.optim.Adam([raw.requires_grad_()], lr=lr)
        for batch in islice(_endless(data), steps):
            logits = torch.func.functional_call(module, {**whole, **merged()}, (batch,))
            entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            adam.zero_grad()
            entropy.backward()
            adam.step()
            entropies.append(entropy.item())
    raw = raw.detach()
    if report is not None:
        report |= {"coefficients": raw.clamp(0, 1).mean(0).tolist(),
                   "entropy": [*entropies[:1], *entropies[-1:]]}
    return merged()


def _endless(data: Iterable[Tensor]) -> Iterator[Tensor]:
    while True:
        batch = None
        for batch in data:
            yield batch
        if batch is None:
            raise DataError("there are no images to learn the coefficients from")
