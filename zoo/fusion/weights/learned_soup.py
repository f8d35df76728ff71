"""The learned soup: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned
models improves accuracy without increasing inference time", arXiv:2203.05482, appendix I."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError
from zoo.fusion.candidates import completed, is_statistic, own_keys
from zoo.fusion.norms import MEAN, VARIANCE
from zoo.fusion.weighting import want_shares

State = Mapping[str, Tensor]


def learned_soup(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
    labels: Iterable[Tensor],
    score: Callable[[State], float],
    report: dict[str, Any] | None = None,
    per: Literal["model", "tensor"] = "model",
    epochs: int = 5,
    lr: float = 0.05,
) -> dict[str, Tensor]:
    """Σ softmax(a)ᵢ θᵢ with the a, and the temperature of the logits, of the least cross-entropy.

    AdamW starts from equal shares; a temperature b makes the logits b · z, for the loss alone.
    Meanwhile the running statistics are the mixture's. The learned soup, the one that it started
    from and each member are scored on images that were not learned from, and the best is the
    result.

    states: one per member. weights: by key, one number ≥ 0 per member: where the shares start
    (those of the first tensor, for one share per model). report: gets `shares` (their mean over
    the tensors), `temperature`, the `scores` of the soup, its start and each member, and which
    `won`.
    Raises OptionError for negative weights, epochs or lr.
    Wortsman et al. 2022, arXiv:2203.05482.

    Options:
        per: one share per member for the whole "model", or for each "tensor"
        epochs: passes over the data
        lr: AdamW's
    """
    if epochs < 0 or lr < 0:
        raise OptionError("learned_soup", f"epochs is {epochs} and lr {lr}, expected 0 or more")
    want_shares("learned_soup", weights)
    keys = [key for key in own_keys(module, states[0]) if states[0][key].is_floating_point()]
    rows = list(weights) if per == "tensor" else [next(iter(weights))]
    raw = torch.tensor([weights[key] for key in rows], device=states[0][rows[0]].device).log()
    temperature = torch.ones((), device=raw.device)
    row_of = {key: row for row, key in enumerate(rows)}
    begun = raw.softmax(1)
    with torch.enable_grad():
        learned = [raw.requires_grad_(), temperature.requires_grad_()]
        adam = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
        for _ in range(epochs):
            for batch, truth in zip(data, labels, strict=True):
                mixed = _mixed(states, keys, raw.softmax(1), row_of)
                logits = torch.func.functional_call(module, mixed, (batch,))
                adam.zero_grad()
                loss = functional.cross_entropy(temperature * logits, truth)
                loss.backward()  # type: ignore[no-untyped-call]
                adam.step()
    shares = raw.detach().softmax(1)
    candidates = {
        name: completed(_mixed(states, keys, found, row_of), states, [1.0] * len(states))
        for name, found in (("soup", shares), ("start", begun))}
    candidates |= {f"member {number}": dict(state) for number, state in enumerate(states, 1)}
    scores = {name: score(state) for name, state in candidates.items()}
    won = max(scores, key=lambda name: scores[name])  # of equal ones the first
    if report is not None:
        report |= {"shares": shares.mean(0).tolist(), "temperature": temperature.item(),
                   "scores": scores, "won": won}
    return candidates[won]


def _mixed(
    states: Sequence[State], keys: Sequence[str], shares: Tensor, row_of: Mapping[str, int]
) -> dict[str, Tensor]:
    """The mixture of the members; shares: [R, M], their mean for what has no row of its own."""
    mixed: dict[str, Tensor] = {}
    rows = {key: shares[row_of[_leader(key)]] if _leader(key) in row_of else shares.mean(0)
            for key in keys}
    for key, row in rows.items():
        if is_statistic(key):
            row = row.detach()  # batch norm has no gradient for them
        first = states[0][key]
        # Offsets from the first member keep equal members exactly equal.
        mixed[key] = first + sum(share * (state[key] - first)
                                 for share, state in zip(row[1:], states[1:], strict=True))
    for key, row in rows.items():
        mean = key.removesuffix(VARIANCE) + MEAN
        if key.endswith(VARIANCE) and mean in mixed:  # what the members' means differ by
            mixed[key] = mixed[key] + sum(
                share * (state[mean] - mixed[mean]) ** 2
                for share, state in zip(row.detach(), states, strict=True))
    return mixed


def _leader(key: str) -> str:
    """Running statistics have the shares of their batch norm's weight."""
    return f"{key.rpartition('.')[0]}.weight" if is_statistic(key) else key
