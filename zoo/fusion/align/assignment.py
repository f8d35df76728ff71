"""Which unit of one network corresponds to which of another: linear assignment on similarities."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from zoo.fusion.align.graph import Graph, Group

# Similarity [units, units] of a group's units in the reference with those in the other network.
Similarity: TypeAlias = Callable[[Group], Tensor]


def assign(graph: Graph, group: Group, similarity: Similarity) -> dict[str, Tensor]:
    """The permutation of the other network's units under which they are most similar to the
    reference's, by the Hungarian method.

    For a group of blocks (attention heads) every pair of blocks is first matched inside, and the
    blocks are then matched by what they reach; the result has the permutations of their insides.
    """
    whole = similarity(group).double().cpu()
    if not group.parts:
        return {group.name: _best(whole)}
    blocks = group.size
    inner: dict[tuple[int, int, int], Tensor] = {}
    for number, together in enumerate(graph.parts_together(group)):
        size = together.size // blocks
        pairs = similarity(together).double().cpu().view(blocks, size, blocks, size)
        for one in range(blocks):
            for other in range(blocks):
                found = pairs[one, :, other]  # (size, size)
                order = _best(found)
                inner[number, one, other] = order
                whole[one, other] += found[torch.arange(size), order].sum() - found.trace()
    orders = {group.name: _best(whole)}
    for (number, one, other), order in inner.items():
        if int(orders[group.name][one]) == other:
            orders[group.parts[other][number]] = order
    return orders


def _best(similarity: Tensor) -> Tensor:
    _, order = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(order).long()
