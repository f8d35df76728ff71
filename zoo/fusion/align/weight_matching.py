"""Weight matching: Ainsworth et al. 2023, "Git Re-Basin: merging models modulo permutation
symmetries", arXiv:2209.04836."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from zoo.fusion.align.assignment import assign
from zoo.fusion.align.graph import Graph, Group, permute

State = Mapping[str, Tensor]


def match_weights(
    reference: State,
    state: State,
    graph: Graph,
    *,
    keys: Collection[str],
    restarts: int = 1,
    max_iter: int = 100,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The permutations π that bring a network's weights near to the reference's:
    argmax ⟨θ_A, π(θ_B)⟩, one group at a time, the others held, until none improves it.

    reference, state: floating-point tensors with the same keys. keys: those that count; running
    statistics better do not. restarts: how many starts, the first with no permutation, the others
    random; the best is taken. max_iter: rounds over all groups at most. Returns the permutation
    of each group, for `permute`. Ainsworth et al. 2023, arXiv:2209.04836, algorithm 1; a step
    that does not improve the product, as is possible where a group stands on two axes of one
    tensor, is not taken.
    """
    draw = torch.Generator().manual_seed(seed)
    inside = {name for group in graph.outermost for part in group.parts for name in part}
    turns = [group for group in graph.groups if group.name not in inside]  # their blocks' turn
    identity = graph.identity()
    best, most = identity, -torch.inf
    for attempt in range(restarts):
        orders = identity if attempt == 0 else graph.random(draw)
        moved = permute(state, graph, orders)
        for _ in range(max_iter):
            improved = False
            for number in torch.randperm(len(turns), generator=draw).tolist():
                group = turns[number]
                step = assign(graph, group, _Products(reference, moved, keys))
                after = permute(moved, graph, step)
                touched = {place.key for place in group.places} & set(keys)
                if _gain(reference, moved, after, touched) > 0:
                    improved, moved = True, after
                    orders = graph.compose(orders, identity | step)
            if not improved:
                break
        reached = sum(float((reference[key] * moved[key]).sum()) for key in keys)
        if reached > most:
            best, most = orders, reached
    return best


class _Products:
    """Similarity as the inner product of all weights of two units."""

    def __init__(self, reference: State, moved: State, keys: Collection[str]) -> None:
        self.states = reference, moved
        self.keys = keys

    def __call__(self, group: Group) -> Tensor:
        total = torch.zeros(group.size, group.size)
        for place in group.places:
            if place.key in self.keys:
                one, other = (
                    state[place.key].movedim(place.axis, 0)[place.index].flatten(1)
                    for state in self.states)  # (units, weights of each)
                total = total.to(one) + one @ other.T
        return total


def _gain(reference: State, before: State, after: State, keys: Collection[str]) -> float:
    """By how much the product grew, 0 where that may be rounding."""
    gain = sum(float((reference[key] * (after[key] - before[key])).sum()) for key in keys)
    scale = sum(float(reference[key].norm() * before[key].norm()) for key in keys)
    return gain if gain > 1e-6 * scale else 0.0
