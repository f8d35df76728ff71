"""Re-basin and REPAIR as strategies: on copies that are permuted, and on networks that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.datasets import load_data
from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.align import Graph, permute, trace
from zoo.fusion.align.repairing import repaired
from zoo.fusion.weights.average import average
from zoo.fusion.weights.rebasin import rebasin
from zoo.fusion.weights.repair import repair

State = dict[str, Tensor]


def normed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3),
                         nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 32),
                         nn.ReLU(), nn.Linear(32, 5)).eval()


def state_of(build: Callable[[], nn.Module], seed: int) -> State:
    torch.manual_seed(seed)
    state = {key: tensor.detach().clone() for key, tensor in build().state_dict().items()}
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor += 0.5 * torch.rand_like(tensor)
        elif "tracked" in key:
            tensor += seed
    return state


def batches(count: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(64, 3, 6, 6, generator=draw) for _ in range(count)]


def graph_of(build: Callable[[], nn.Module]) -> Graph:
    return trace(build(), batches()[0][:1])


def weights(state: State, *shares: float) -> dict[str, list[float]]:
    return {key: list(shares) for key, tensor in state.items()
            if tensor.is_floating_point() and "running" not in key}


def shuffled(build: Callable[[], nn.Module], state: State, seed: int) -> State:
    graph = graph_of(build)
    return permute(state, graph, graph.random(torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("options", [
    {}, {"matching": "activations"}, {"center": "mean"}, {"restarts": 1},
])
def test_permuted_copies_give_the_model_back(options: dict[str, Any]) -> None:
    state = state_of(normed, 0)
    states = [state, *(shuffled(normed, state, seed) for seed in (1, 2))]
    before = [{key: tensor.clone() for key, tensor in one.items()} for one in states]
    fused = rebasin(states, base=None, weights=weights(state, 1.0, 2.0, 1.0),
                    graph=graph_of(normed), module=normed(), data=batches(), **options)
    assert {"1.running_mean", "4.running_var", "7.weight"} <= fused.keys()
    for key, tensor in fused.items():
        torch.testing.assert_close(tensor, state[key], msg=key)
    assert all(torch.equal(old[key], new[key])
               for old, new in zip(before, states, strict=True) for key in new)


def test_running_statistics_are_pooled_after_they_moved() -> None:
    state = state_of(normed, 0)
    shifted = {key: tensor + 1 if key == "1.running_mean" else tensor
               for key, tensor in state.items()}
    states = [state, shuffled(normed, shifted, 1)]
    fused = rebasin(states, base=None, weights=weights(state, 1.0, 1.0), graph=graph_of(normed))
    torch.testing.assert_close(fused["1.running_mean"], state["1.running_mean"] + 0.5)
    torch.testing.assert_close(fused["1.running_var"], state["1.running_var"] + 0.25)


def test_weights_count_after_the_permutation() -> None:
    one, other = state_of(plain, 0), state_of(plain, 1)
    graph = graph_of(plain)
    ends = [rebasin([one, other], base=None, weights=weights(one, *shares), graph=graph)
            for shares in ((1.0, 0.0), (0.0, 1.0))]
    for key in one:
        torch.testing.assert_close(ends[0][key], one[key])
    images = batches()[0]
    with torch.no_grad():
        expected = torch.func.functional_call(plain(), other, (images,))
        found = torch.func.functional_call(plain(), ends[1], (images,))
    torch.testing.assert_close(found, expected)
    assert not torch.equal(ends[1]["0.weight"], other["0.weight"])


def test_the_others_mean_brings_several_nearer_together() -> None:
    states = [state_of(plain, seed) for seed in range(4)]

    def spread(center: Literal["first", "mean"]) -> float:
        fused = rebasin(states, base=None, weights=weights(states[0], 1, 1, 1, 1),
                        graph=graph_of(plain), center=center)
        return -sum(float(tensor.square().sum()) for tensor in fused.values())

    # The members' norms are given: the larger their mean is, the nearer they are together.
    assert spread("mean") < spread("first")


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"restarts": 0}, OptionError, "restarts is 0, expected 1 or more"),
    ({"max_iter": -1}, OptionError, "max_iter is -1, expected 1 or more"),
    ({"matching": "activations", "center": "mean"}, OptionError, "center is 'mean', which needs"),
    ({"matching": "activations"}, FusionError, "matching='activations' looks at activations, and "
     "no data are given. Pass data="),
    ({"repair": True}, FusionError, "repair=True looks at activations, and no data are given"),
])
def test_what_is_missing_is_said(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = state_of(plain, 0)
    with pytest.raises(error, match=message):
        rebasin([state, state], base=None, weights=weights(state, 1, 1), graph=graph_of(plain),
                **options)


def test_a_network_without_groups_is_refused() -> None:
    state = {"weight": torch.ones(2, 2)}
    with pytest.raises(FusionError, match=r"no units of this network can be permuted. 'average'"):
        rebasin([state, state], base=None, weights={"weight": [1, 1]}, graph=Graph((), {}))


def moments(build: Callable[[], nn.Module], state: State, layer: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a layer's channels on the batches."""
    net: Any = build()
    net.load_state_dict(state)
    with torch.no_grad():
        out = net[:layer + 1](torch.cat(batches())).transpose(0, 1).flatten(1)
    return out.mean(1), out.std(1)


def mean_of(states: list[State]) -> State:
    return {key: average([state[key] for state in states], base=None, key=key, weight=[1, 1])
            for key in states[0]}


def test_repair_gives_every_channel_the_members_statistics() -> None:
    states = [state_of(plain, seed) for seed in (0, 1)]
    fused = mean_of(states)
    result = repaired(plain(), fused, states, [1, 1], batches())
    for layer in (0, 3):
        members = [moments(plain, state, layer) for state in states]
        wanted = [(one + other) / 2 for one, other in zip(*members, strict=True)]
        found, before = moments(plain, result, layer), moments(plain, fused, layer)
        torch.testing.assert_close(found[0], wanted[0], atol=0.02, rtol=0.02)
        torch.testing.assert_close(found[1], wanted[1], atol=0.02, rtol=0.05)
        assert (before[1] - wanted[1]).abs().mean() > 5 * (found[1] - wanted[1]).abs().mean()
    assert torch.equal(result["5.weight"], fused["5.weight"])  # the last layer stays


def test_repair_follows_the_shares() -> None:
    states = [state_of(plain, seed) for seed in (0, 1)]
    result = repair(states, base=None, weights=weights(states[0], 3.0, 1.0), module=plain(),
                    data=batches())
    members = [moments(plain, state, 0)[1] for state in states]
    torch.testing.assert_close(moments(plain, result, 0)[1], 0.75 * members[0] + 0.25 * members[1],
                               atol=0.01, rtol=0.01)


def test_repair_of_copies_gives_them_back() -> None:
    state = state_of(plain, 0)
    whole = [torch.cat(batches())]
    result = repaired(plain(), state, [state, state], [1, 1], whole)
    for key, tensor in result.items():
        torch.testing.assert_close(tensor, state[key], atol=1e-4, rtol=1e-3)


def test_repair_of_tied_weights_needs_the_first_of_them() -> None:
    net = nn.Sequential(nn.Flatten(), *(nn.Linear(108, 108), nn.ReLU()) * 2, nn.Linear(108, 5))
    assert net[1] is net[3]
    states = [{key: torch.randn_like(tensor) for key, tensor in net.state_dict().items()}
              for _ in range(2)]
    shares = weights({key: tensor for key, tensor in states[0].items() if key[0] != "3"}, 1.0, 1.0)
    result = repair(states, base=None, weights=shares, module=net, data=batches())
    for state in states:
        state["3.weight"] += 100
    again = repair(states, base=None, weights=shares, module=net, data=batches())
    assert torch.equal(again["1.weight"], result["1.weight"])


def test_repair_of_batch_norm_estimates_its_statistics_again() -> None:
    states = [state_of(normed, seed) for seed in (0, 1)]
    fused = mean_of([{key: tensor.float() for key, tensor in state.items()} for state in states])
    module = normed()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    result = repaired(module, fused, states, [1, 1], batches())
    mean, deviation = moments(normed, {**result, "1.weight": torch.ones(6),
                                       "1.bias": torch.zeros(6)}, 1)
    torch.testing.assert_close(mean, torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(deviation, torch.ones(6), atol=1e-2, rtol=0)
    assert torch.equal(result["0.weight"], fused["0.weight"])
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_repair_needs_batches_and_layers() -> None:
    state = state_of(plain, 0)
    with pytest.raises(DataError, match="there is no batch to take statistics of activations from"):
        repaired(plain(), state, [state], [1], [])
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    with pytest.raises(FusionError, match="no convolution or linear layer with a bias before its"):
        repaired(net, net.state_dict(), [net.state_dict()], [1], batches())


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
def test_networks_of_different_seeds_fuse_by_name() -> None:
    train, test = (load_data("zoo/digits", split=split) for split in ("train", "test"))
    members = [zoo.backbone("zoo/mnist_cnn", num_classes=10, image_size=8, seed=seed, device="cpu")
               for seed in (0, 1)]
    for seed, member in enumerate(members):
        zoo.transfer(member, train, "finetune", epochs=10, lr=3e-3, seed=seed)
    ends = min(zoo.evaluate(member, test).accuracy for member in members)
    assert ends > 0.93

    def accuracy(strategy: str, **options: Any) -> float:
        found: float = zoo.evaluate(zoo.fuse(members, strategy, **options), test).accuracy
        return found

    assert accuracy("average") < ends - 0.2
    assert accuracy("average") + 0.1 < accuracy("repair", data=train) < ends - 0.05
    assert accuracy("rebasin") > ends - 0.05
    assert accuracy("rebasin", matching="activations", data=train) > ends - 0.05
    assert accuracy("rebasin", repair=True, data=train) > ends - 0.05
    assert accuracy("average", norms="repair", data=train) == accuracy("repair", data=train)
    by_itself = zoo.fuse(members, "average", data=train)
    assert next(by_itself.each_member()).norms == "repaired"
    assert zoo.evaluate(by_itself, test).accuracy > accuracy("average") + 0.1
    aligned = zoo.fuse(members, "rebasin", norms="repair", data=train)
    assert aligned.fusion.options["repair"] is True
    assert zoo.evaluate(aligned, test).accuracy == accuracy("rebasin", repair=True, data=train)


def test_vision_transformers_fuse_by_name() -> None:
    vits = [zoo.backbone("timm/test_vit", num_classes=3, image_size=32, seed=seed, device="cpu")
            for seed in (0, 1)]
    assert zoo.fuse(vits, "rebasin", restarts=1).fusion.options["matching"] == "weights"
