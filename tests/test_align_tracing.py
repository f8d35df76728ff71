"""Which units a trace finds to move together, and which it leaves where they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion.align import Graph, Group, Place, permute, trace
from zoo.fusion.align.checking import verified


class Net(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, layers: dict[str, nn.Module], run: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(into: int, out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1, **options)


def images(channels: int = 3, side: int = 4) -> Tensor:
    return torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))


def sizes(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups}


def places(group: Group) -> dict[tuple[str, int], list[list[int]]]:
    return {(place.key, place.axis): place.index.tolist() for place in group.places}


def test_a_hidden_layer_moves_with_its_norm() -> None:
    net = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 2))
    graph = trace(net, images())
    assert [list(places(group)) for group in graph.groups] == [[
        ("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0),
        ("1.running_var", 0), ("3.weight", 1)]]
    assert [(site.key, site.axis) for site in graph.groups[0].sites] == [("0", 1), ("1", 1)]


def test_a_flattened_map_moves_by_whole_channels() -> None:
    net = nn.Sequential(conv(1, 3), nn.Flatten(), nn.Linear(3 * 4, 2))
    (group,) = trace(net, images(1, 2)).groups
    assert places(group)["2.weight", 1] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    net = Net({"a": conv(1, 3), "b": nn.Linear(3 * 4, 2)},
              lambda net, x: net.b(net.a(x).permute(0, 2, 3, 1).flatten(1)))
    (group,) = trace(net, images(1, 2)).groups
    assert places(group)["b.weight", 1] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_concatenated_channels_stand_side_by_side() -> None:
    net = Net({"a": conv(3, 2), "b": conv(3, 3), "bn": nn.BatchNorm2d(5), "c": conv(5, 2)},
              lambda net, x: net.c(net.bn(torch.cat([net.b(x), net.a(x)], 1))))
    graph = trace(net, images())
    first, second = graph.groups
    assert (first.size, second.size) == (2, 3)
    assert places(first)["c.weight", 1] == [[3], [4]]
    assert places(second)["bn.running_var", 0] == [[0], [1], [2]]


def test_binary_operations_tie_groups_together() -> None:
    net = Net({"a": conv(3, 4), "b": conv(4, 6), "c": conv(6, 4), "d": conv(4, 2)},
              lambda net, x: net.d(torch.max(net.a(x), net.c(F.relu(net.b(net.a(x)))))))
    graph = trace(net, images())
    assert sizes(graph) == {"a.weight:0": 4, "b.weight:0": 6}
    assert {("a.weight", 0), ("b.weight", 1), ("c.weight", 0), ("c.bias", 0), ("d.weight", 1)} <= (
        places(graph.by_name["a.weight:0"]).keys())


def test_adding_channels_to_copies_of_others_ties_them_in_pairs() -> None:
    def ghost(net: Net, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.c(torch.cat([y, net.dw(y)], 1) + net.b(x))

    net = Net({"a": conv(3, 3), "dw": conv(3, 3, groups=3), "b": conv(3, 6), "c": conv(6, 2)},
              ghost)
    (group,) = trace(net, images()).groups
    assert group.size == 3
    assert places(group)["b.weight", 0] == [[0, 3], [1, 4], [2, 5]]
    assert places(group)["dw.weight", 0] == [[0], [1], [2]]


def test_a_grouped_convolution_moves_whole_groups_and_outputs_inside() -> None:
    net = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 9, groups=3), nn.ReLU(), conv(9, 2))
    graph = trace(net, images())
    *inside, whole = graph.groups
    assert [group.size for group in inside] == [3, 3, 3]
    assert whole.size == 3
    assert whole.parts == tuple((group.name,) for group in inside)
    assert places(whole)["0.weight", 0] == [[0, 1], [2, 3], [4, 5]]
    assert ("2.weight", 1) not in graph.moved()


class Attention(nn.Module):
    """Two heads of three channels; queries and keys may be normalised with shared weights."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(4, 6), nn.Linear(6, 18)
        self.proj, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm: nn.Module = nn.LayerNorm(3) if normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).mT)  # (1, 9, 6)
        q, k, v = self.qkv(x).view(1, 9, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


def test_heads_move_as_blocks_and_inside_queries_with_keys() -> None:
    graph = trace(Attention(normed=False), images(4, 3))
    heads = next(group for group in graph.groups if group.parts)
    assert heads.size == 2
    assert places(heads)["proj.weight", 1] == [[0, 1, 2], [3, 4, 5]]
    value, both = (graph.by_name[name] for name in heads.parts[1])
    assert places(both) == {("qkv.weight", 0): [[3, 9], [4, 10], [5, 11]],
                            ("qkv.bias", 0): [[3, 9], [4, 10], [5, 11]]}
    assert places(value)["qkv.weight", 0] == [[15], [16], [17]]
    assert places(value)["proj.weight", 1] == [[3], [4], [5]]
    assert {group.name for group in graph.outermost} == {"embed.weight:0", heads.name}


def test_norms_of_queries_and_keys_tie_all_heads() -> None:
    graph = trace(Attention(normed=True), images(4, 3))
    both = next(group for group in graph.groups if ("norm.weight", 0) in places(group))
    assert places(both)["qkv.weight", 0] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert sum(("proj.weight", 1) in places(group) for group in graph.groups) == 2


@pytest.mark.parametrize(("run", "why"), [
    (lambda net, x: net.b(net.a(x).cumsum(1)), "order matters"),
    (lambda net, x: net.b(net.a(x).sort(dim=1).values), "an unknown operation"),
    (lambda net, x: net.b(net.a(x) * torch.arange(1., 5.).view(1, 4, 1, 1)), "constants differ"),
    (lambda net, x: net.b(net.a(x) + F.pad(x, (0, 0, 0, 0, 0, 1))), "inputs stay"),
    (lambda net, x: net.b(net.a(x) + net.a(x).roll(1, 1)), "each meets the next"),
    (lambda net, x: net.b(net.a(x)) + net.a(x)[:, :2].mean(), "some are read alone"),
])
def test_what_cannot_move_stays(run: Callable[..., Tensor], why: str) -> None:
    graph = trace(Net({"a": conv(3, 4), "b": conv(4, 2)}, run), images())
    assert sizes(graph) == {}, why


def test_a_constant_that_is_the_same_for_all_lets_them_move() -> None:
    net = Net({"a": conv(3, 4), "b": conv(4, 2)},
              lambda net, x: net.b(net.a(x) * torch.full((1, 4, 1, 1), 2.0) + x.mean(1, True)))
    assert sizes(trace(net, images())) == {"a.weight:0": 4}


def test_outputs_keep_their_order() -> None:
    assert trace(conv(3, 4), images()).groups == ()


def test_tied_weights_move_under_both_names() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6),
                        nn.ReLU(), nn.Linear(6, 2))
    net[4].weight = net[2].weight
    (group,) = trace(net, torch.randn(2, 4)).groups
    assert {("2.weight", 0), ("2.weight", 1), ("4.weight", 0), ("4.weight", 1)} <= (
        places(group).keys())


def test_tracing_changes_nothing() -> None:
    net = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.Dropout(), conv(5, 2)).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    trace(net, images())
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_network_that_does_not_run_is_named() -> None:
    with pytest.raises(FusionError, match=r"does not run on an input of \[1, 2, 4, 4\]: Given gro"):
        trace(conv(3, 4), images(2))


def test_the_check_lets_no_wrong_group_pass() -> None:
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2))
    right = trace(net, images()).groups
    units = torch.arange(4)[:, None]
    wrong = Group("wrong", 4, (Place("0.weight", 0, units), Place("0.bias", 0, units),
                               Place("2.weight", 1, units.flip(0))))
    kept = verified(net, images(), [right[0], wrong, right[1]])
    assert [group.name for group in kept] == [group.name for group in right]


def test_permuting_changes_no_input_and_no_counter() -> None:
    net = nn.Sequential(conv(3, 5), nn.BatchNorm2d(5), nn.ReLU(), conv(5, 2))
    state, graph = net.state_dict(), trace(net, images())
    before = {key: tensor.clone() for key, tensor in state.items()}
    order = torch.tensor([4, 2, 0, 1, 3])
    permuted = permute(state, graph, {"0.weight:0": order})
    assert torch.equal(permuted["0.weight"], before["0.weight"][order])
    assert torch.equal(permuted["3.weight"], before["3.weight"][:, order])
    assert permuted["1.num_batches_tracked"] is state["1.num_batches_tracked"]
    assert all(torch.equal(before[key], state[key]) for key in state)


def test_wrong_permutations_are_refused() -> None:
    net = nn.Sequential(conv(3, 5), nn.ReLU(), conv(5, 2))
    graph = trace(net, images())
    with pytest.raises(FusionError, match=r"has no group 'x'. Take the names from graph.groups"):
        permute(net.state_dict(), graph, {"x": torch.arange(5)})
    with pytest.raises(FusionError, match=r"order of '0.weight:0' is no permutation of its 5"):
        permute(net.state_dict(), graph, {"0.weight:0": torch.tensor([0, 1, 2, 3, 3])})
    other = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 2)).state_dict()
    with pytest.raises(ShapeMismatch, match=r"'0.weight' is \[6, 3, 3, 3\], and \[5, 3, 3, 3\] in"):
        permute(other, graph, {"0.weight:0": torch.arange(5)})


def test_composed_permutations_are_one_after_the_other() -> None:
    net = Attention(normed=False)
    state, graph = net.state_dict(), trace(net, images(4, 3))
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        first, then = graph.random(draw), graph.random(draw)
        expected = permute(permute(state, graph, first), graph, then)
        found = permute(state, graph, graph.compose(first, then))
        assert all(torch.equal(expected[key], found[key]) for key in state)
