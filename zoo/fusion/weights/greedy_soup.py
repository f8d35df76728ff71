"""The greedy soup: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned
models improves accuracy without increasing inference time", arXiv:2203.05482."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from zoo.fusion.candidates import completed
from zoo.fusion.weights.average import average


def greedy_soup(
    states: Sequence[Mapping[str, Tensor]],
    *,
    weights: Mapping[str, Sequence[float]],
    score: Callable[[Mapping[str, Tensor]], float],
    report: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The mean of members that do each other no harm on validation data.

    Members are taken in descending order of their score, of equal ones the first first; one stays
    if the mean with it scores no worse than the mean without. So the result never scores worse
    than the best member. Every candidate has its running statistics pooled, and estimated again
    where the score says so.

    states: one per member. weights: by key, one number per member, equal for the plain mean.
    report: gets `members`, in the order in which they were tried: `member` (from 1), `score` alone,
    `kept`, and the `soup` it made; and `score`, that of the result.
    Wortsman et al. 2022, arXiv:2203.05482.
    """
    alone = [score(state) for state in states]
    first, *others = sorted(range(len(states)), key=lambda member: -alone[member])
    soup, best = [first], alone[first]
    told = [{"member": first + 1, "score": alone[first], "soup": best, "kept": True}]
    for member in others:
        found = score(_mean(states, weights, sorted([*soup, member])))
        told.append({"member": member + 1, "score": alone[member], "soup": found,
                     "kept": found >= best})
        if found >= best:
            soup, best = [*soup, member], found
    if report is not None:
        report |= {"members": told, "score": best}
    return _mean(states, weights, sorted(soup))


def _mean(
    states: Sequence[Mapping[str, Tensor]], weights: Mapping[str, Sequence[float]],
    soup: Sequence[int],
) -> dict[str, Tensor]:
    """The mean of these members, everything included that a network has."""
    chosen = [states[member] for member in soup]
    shares = {key: [row[member] for member in soup] for key, row in weights.items()}
    fused = {key: average([state[key] for state in chosen], base=None, key=key, weight=row)
             for key, row in shares.items()}
    return completed(fused, chosen, next(iter(shares.values())))
