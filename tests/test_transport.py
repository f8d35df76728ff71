"""OT fusion and ZipIt: fusions of networks whose units stand in another order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.align import Graph, permute, trace
from zoo.fusion.weights.ot_fusion import _sinkhorn, ot_fusion
from zoo.fusion.weights.zipit import _across, _merged, _zipped, zipit
from zoo.model import Model
from zoo.store import network

State = dict[str, Tensor]


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
                         nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10), nn.ReLU(),
                         nn.Linear(10, 4)).eval()


def drawn(make: Callable[[], nn.Module], seed: int) -> State:
    torch.manual_seed(seed)
    state = make().state_dict()
    for key, tensor in state.items():
        if key.endswith(("running_mean", "1.bias", "1.weight")):
            tensor.add_(0.3 * torch.randn(tensor.shape))
    return state


def images(count: int = 24) -> list[Tensor]:
    return list(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(12))


def fused(
    strategy: Callable[..., State], states: list[State], graph: Graph,
    share: tuple[float, ...] = (1.0, 1.0, 1.0), **options: Any,
) -> State:
    keys = [key for key, tensor in states[0].items()
            if tensor.is_floating_point() and "running" not in key]
    with torch.no_grad():
        return strategy(states, weights={key: share[:len(states)] for key in keys}, graph=graph,
                        **options)


def answers(state: Mapping[str, Tensor]) -> Tensor:
    net = convolutional()
    net.load_state_dict({**net.state_dict(), **state})
    with torch.no_grad():
        answers: Tensor = torch.cat([net(batch) for batch in images()])
    return answers


def twins(count: int = 2) -> tuple[State, list[State], Graph]:
    """A network, and members that are it with their units in other orders."""
    state = drawn(convolutional, 0)
    graph = trace(convolutional(), images()[0])
    draw = torch.Generator().manual_seed(7)
    others = [permute(state, graph, graph.random(draw)) for _ in range(count - 1)]
    return state, [state, *others], graph


@pytest.mark.parametrize("strategy", [
    ot_fusion,
    lambda states, **given: zipit(states, module=convolutional(), data=images(), **given)])
@pytest.mark.parametrize("count", [2, 3])
def test_networks_that_differ_in_order_alone_give_the_network(
    strategy: Callable[..., State], count: int
) -> None:
    state, members, graph = twins(count)
    torch.testing.assert_close(answers(members[1]), answers(state))
    mean = {key: sum(each[key] for each in members) / count for key in state}
    assert not torch.allclose(answers(mean), answers(state), atol=0.05)
    result = fused(strategy, members, graph)
    torch.testing.assert_close(answers(result), answers(state), rtol=1e-3, atol=1e-3)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def test_each_layer_goes_where_its_incoming_weights_are_nearest() -> None:
    one, other = drawn(perceptron, 0), drawn(perceptron, 1)
    graph = trace(perceptron(), torch.randn(2, 5))
    result = fused(ot_fusion, [one, other], graph)

    def best(matrix: Tensor, target: Tensor) -> Tensor:
        orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
        return min(orders, key=lambda order: float((matrix[order] - target).square().sum()))

    def incoming(state: State, layer: int, before: Tensor) -> Tensor:
        return torch.cat([state[f"{layer}.weight"][:, before], state[f"{layer}.bias"][:, None]], 1)

    first = best(incoming(other, 0, torch.arange(5)), incoming(one, 0, torch.arange(5)))
    second = best(incoming(other, 2, first), incoming(one, 2, torch.arange(4)))
    for key, moved in (("0.weight", other["0.weight"][first]), ("0.bias", other["0.bias"][first]),
                       ("2.weight", other["2.weight"][second][:, first]),
                       ("4.weight", other["4.weight"][:, second]), ("4.bias", other["4.bias"])):
        torch.testing.assert_close(result[key], (one[key] + moved) / 2)


def test_a_regularised_transport_splits_units() -> None:
    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    soft, sharp = _sinkhorn(cost, 1.0), _sinkhorn(cost, 1e-3)
    for plan in (soft, sharp):
        torch.testing.assert_close(plan.sum(0), torch.ones(6).double())
        torch.testing.assert_close(plan.sum(1), torch.ones(6).double(), rtol=1e-2, atol=1e-2)
    assert soft.max() < 0.5 < 0.9 < sharp.max(1).values.min()
    _, members, graph = twins()
    exact = fused(ot_fusion, members, graph)
    near = fused(ot_fusion, members, graph, regularisation=1e-3)
    torch.testing.assert_close(answers(near), answers(exact), rtol=1e-3, atol=1e-3)
    far = fused(ot_fusion, members, graph, regularisation=100.0)
    mean = members[1]["3.bias"].mean()  # all units are mixed evenly
    torch.testing.assert_close(far["3.bias"], (members[0]["3.bias"] + mean) / 2, atol=0.02, rtol=0)


def test_an_input_stands_for_all_parts_and_outputs_are_averaged() -> None:
    """Σ Mₘ Wₘ Uₘ, with the paper's matrices written out."""
    states = [drawn(perceptron, seed) for seed in (0, 1)]
    graph = trace(perceptron(), torch.randn(2, 5))
    below, above = (group for group in graph.groups)
    zips = {below.name: torch.tensor([0, 0, 1, 2, 1, 3, 3, 2]),
            above.name: torch.tensor([0, 1, 2, 3, 3, 1, 0, 0])}
    share = (3.0, 1.0)

    def matrices(part_of: Tensor) -> list[tuple[Tensor, Tensor]]:
        own = torch.tensor(share).repeat_interleave(4)
        merge, unmerge = torch.zeros(4, 8), torch.zeros(8, 4)
        for feature, part in enumerate(part_of.tolist()):
            merge[part, feature] = own[feature] / own[part_of == part].sum()
            unmerge[feature, part] = 1
        return [(merge[:, start:start + 4], unmerge[start:start + 4]) for start in (0, 4)]

    def merged(key: str) -> Tensor:
        places = [(place.axis, group, place.index) for group in graph.groups
                  for place in group.places if place.key == key]
        return _merged([state[key] for state in states], places, zips, share)

    low, high = matrices(zips[below.name]), matrices(zips[above.name])
    expected = sum(high[m][0] @ states[m]["2.weight"] @ low[m][1] for m in range(2))
    torch.testing.assert_close(merged("2.weight"), expected)
    torch.testing.assert_close(
        merged("0.bias"), sum(low[m][0] @ states[m]["0.bias"] for m in range(2)))
    last = sum(share[m] / 4 * states[m]["4.weight"] @ high[m][1] for m in range(2))
    torch.testing.assert_close(merged("4.weight"), last)
    torch.testing.assert_close(merged("4.bias"), sum(
        share[m] / 4 * states[m]["4.bias"] for m in range(2)))


def correlations(features: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.corrcoef(torch.randn(features, 40, generator=draw))


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.125), (0.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_as_many_features_are_left_as_one_member_has(
    members: int, alpha: float, beta: float
) -> None:
    for seed in range(5):
        part_of = _zipped(correlations(members * 8, seed), members, alpha, beta)
        assert part_of.unique().tolist() == list(range(8))


def test_the_nearest_features_are_merged_first() -> None:
    similarity = torch.eye(4)
    for one, other, value in ((0, 3, 0.9), (1, 2, 0.2), (0, 1, 0.8), (2, 3, -0.5)):
        similarity[one, other] = similarity[other, one] = value
    # Two members of two features: 0 with 3, then 1 with 2, or with its own kind where it may.
    assert _zipped(similarity, 2, 0.3, 0.0).tolist() == [0, 1, 1, 0]
    similarity[0, 1] = similarity[1, 0] = 0.95
    assert _zipped(similarity, 2, 0.3, 0.0).tolist() == [0, 1, 1, 0]
    assert _zipped(similarity, 2, 0.3, 1.0).tolist()[:2] == [0, 0]
    assert _across(torch.tensor([0, 1, 1, 0]), 2) == 1
    assert _across(torch.tensor([0, 0, 1, 1]), 2) == 0


def test_a_merged_feature_is_as_near_as_the_farther_of_its_parts() -> None:
    similarity = torch.eye(4)
    for one, other, value in ((0, 2, 0.9), (1, 2, 0.8), (1, 3, 0.5), (0, 1, 0.1)):
        similarity[one, other] = similarity[other, one] = value
    assert _zipped(similarity, 2, 1.0, 1.0).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("still", [3, 6])
def test_units_that_stand_still_find_themselves_again(still: int) -> None:
    state = drawn(convolutional, 0)
    state["0.weight"][:still] = 0  # constants behind batch norm
    state["0.bias"][:still] = state["1.running_mean"][:still]
    state["1.bias"][:still] = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0, 0.1])[:still]
    state["3.bias"][:3] = -50.0  # move, but not behind the ReLU
    graph = trace(convolutional(), images()[0])
    other = permute(state, graph, graph.random(torch.Generator().manual_seed(7)))
    result = fused(zipit, [state, other], graph, module=convolutional(), data=images(), beta=0.5)
    torch.testing.assert_close(answers(result), answers(state), rtol=1e-3, atol=1e-3)


def test_a_member_merges_no_more_among_its_own_than_it_may() -> None:
    similarity = correlations(32, 0)
    similarity[:16, :16] += 2  # the first member's features are all alike
    similarity[16:, 16:] += 2
    for beta, most in ((0.0, 0), (0.25, 4)):
        part_of = _zipped(similarity, 2, 1.0, beta).view(2, 16)
        for own in part_of:
            assert 16 - len(own.unique()) <= most
    part_of = _zipped(similarity, 2, 1.0, 1.0).view(2, 16)
    assert len(part_of[0].unique()) < 12


def test_zipit_tells_what_it_zipped() -> None:
    _, members, graph = twins()
    report: dict[str, Any] = {}
    fused(zipit, members, graph, module=convolutional(), data=images(), report=report)
    assert set(report["across"]) == {group.name for group in graph.groups}
    assert all(part == 1 for part in report["across"].values())


@pytest.mark.parametrize(("strategy", "more"), [
    (ot_fusion, {}), (zipit, {"module": convolutional(), "data": images()})])
def test_what_cannot_be_moved_is_refused(
    strategy: Callable[..., State], more: dict[str, Any]
) -> None:
    _, members, graph = twins()
    with pytest.raises(FusionError, match=r"no units of this network can be .*'average' does"):
        fused(strategy, members, Graph((), {}), **more)
    if strategy is zipit:
        with pytest.raises(OptionError, match=r"zipit: alpha is -0.1, expected a factor in"):
            fused(zipit, members, graph, **more, alpha=-0.1)
        with pytest.raises(OptionError, match=r"zipit: the weights \(1.0, -1.0\) of .* are no sh"):
            fused(zipit, members, graph, (1.0, -1.0), **more)
        with pytest.raises(DataError, match="no images to compare features on"):
            fused(zipit, members, graph, module=convolutional(), data=[])
    else:
        with pytest.raises(OptionError, match=r"regularisation is -1.0, expected 0 or more"):
            fused(ot_fusion, members, graph, regularisation=-1.0)


def test_with_real_networks_that_differ_in_order_and_a_little_more() -> None:
    """Residual connections, batch norm and pooling: what an average destroys, both keep."""
    truth = torch.arange(128) % 4
    pixels = 0.5 * torch.rand(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels += 0.12 * truth.view(-1, 1, 1, 1)
    data = TensorDataset(pixels, truth)
    model = zoo.backbone("timm/test_resnet", num_classes=4, image_size=32, seed=0, device="cpu")
    zoo.transfer(model, data, "finetune", epochs=6, lr=1e-2, batch_size=16)
    state = network(model).state_dict()
    graph = trace(network(model).eval(), pixels[:2])
    twin: Model = zoo.fuse([model, model], "average", norms="pooled")
    moved = permute(state, graph, graph.random(torch.Generator().manual_seed(0)))
    draw = torch.Generator().manual_seed(1)
    network(twin).load_state_dict({
        key: tensor * (1 + 0.02 * torch.randn(tensor.shape, generator=draw))
        if tensor.dim() > 1 else tensor for key, tensor in moved.items()})

    def right(strategy: str) -> float:
        made = zoo.fuse([model, twin], strategy, data=data, norms="pooled")
        return zoo.evaluate(made, data).accuracy

    own = zoo.evaluate(model, data).accuracy
    assert own > 0.9
    assert right("average") < own - 0.2
    assert right("ot_fusion") > own - 0.05
    assert right("zipit") > own - 0.05
