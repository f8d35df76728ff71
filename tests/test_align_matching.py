"""Matching finds the permutation that was applied, and never makes things worse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import DataError
from zoo.fusion.align import Graph, match_activations, match_weights, permute, trace
from zoo.fusion.align.assignment import assign

State = dict[str, Tensor]


class Small(nn.Module):
    """A residual block with batch norm, attention with two heads, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = (x + self.bn2(self.conv2(x))).relu().flatten(2).mT  # (B, N, 8)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.head((x + self.proj(y)).mean(1))
        return out


def small(seed: int) -> State:
    torch.manual_seed(seed)
    net = Small()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.2 * torch.rand_like(tensor))
    return {key: tensor.detach() for key, tensor in net.state_dict().items()}


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(Small(), torch.randn(1, 3, 4, 4))


def keys(state: State) -> list[str]:
    return [key for key, tensor in state.items()
            if tensor.is_floating_point() and "running" not in key]


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 4, 4, generator=draw) for _ in range(3)]


def same(one: State, other: State) -> bool:
    return all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def product(one: State, other: State) -> float:
    return sum(float((one[key] * other[key]).sum()) for key in keys(one))


@pytest.mark.parametrize("seed", range(4))
def test_a_permuted_copy_is_found_by_its_weights(graph: Graph, seed: int) -> None:
    state = small(0)
    hidden = permute(state, graph, graph.random(torch.Generator().manual_seed(seed)))
    orders = match_weights(state, hidden, graph, keys=keys(state), restarts=5, seed=seed)
    assert same(permute(hidden, graph, orders), state)


@pytest.mark.parametrize("seed", range(4))
def test_a_permuted_copy_is_found_by_its_activations(graph: Graph, seed: int) -> None:
    state = small(0)
    hidden = permute(state, graph, graph.random(torch.Generator().manual_seed(seed)))
    orders = match_activations(Small().eval(), state, hidden, graph, batches())
    assert same(permute(hidden, graph, orders), state)


def test_other_weights_come_nearer_and_more_starts_no_farther(graph: Graph) -> None:
    one, other = small(0), small(1)
    reached = [product(one, permute(other, graph, match_weights(
        one, other, graph, keys=keys(one), restarts=restarts, seed=3))) for restarts in (1, 4)]
    assert product(one, other) < reached[0] <= reached[1]


def test_the_same_seed_gives_the_same_permutations(graph: Graph) -> None:
    one, other = small(0), small(1)
    first, second = (match_weights(one, other, graph, keys=keys(one), restarts=2, seed=5)
                     for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_the_named_keys_count(graph: Graph) -> None:
    state = small(0)
    hidden = permute(state, graph, graph.random(torch.Generator().manual_seed(1)))
    for key in hidden:
        if "running" in key:
            hidden[key] = 1000 * torch.rand_like(hidden[key])
    orders = match_weights(state, hidden, graph, keys=keys(state), restarts=5)
    found = permute(hidden, graph, orders)
    assert all(torch.equal(found[key], state[key]) for key in keys(state))


def test_blocks_are_matched_by_what_their_insides_reach(graph: Graph) -> None:
    heads = next(group for group in graph.groups if group.parts)
    draw = torch.Generator().manual_seed(0)

    def similarity(group: Any) -> Tensor:
        size = group.size
        if group is heads:
            return torch.zeros(size, size)
        alike = torch.zeros(2, 4, 2, 4)
        alike[0, :, 1] = alike[1, :, 0] = torch.eye(4)[torch.randperm(4, generator=draw)]
        return alike.view(8, 8)

    orders = assign(graph, heads, similarity)
    assert orders[heads.name].tolist() == [1, 0]
    assert orders.keys() == {heads.name, *heads.parts[0], *heads.parts[1]}


def test_activations_of_channels_that_never_change_have_no_say(graph: Graph) -> None:
    state = small(0)
    state["bn1.weight"][:2] = 0
    state["bn1.bias"][:2] = -1  # two dead channels
    hidden = permute(state, graph, graph.random(torch.Generator().manual_seed(0)))
    orders = match_activations(Small().eval(), state, hidden, graph, batches())
    assert all(order.isfinite().all() for order in orders.values())
    images = batches()[0]
    with torch.no_grad():
        one, other = (torch.func.functional_call(Small().eval(), found, (images,))
                      for found in (state, permute(hidden, graph, orders)))
    torch.testing.assert_close(one, other)


def test_activations_need_a_batch(graph: Graph) -> None:
    with pytest.raises(DataError, match="there is no batch to compare activations on"):
        match_activations(Small().eval(), small(0), small(1), graph, [])
