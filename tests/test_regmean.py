"""RegMean and RegMean++ against regressions written out, and the inputs of layers of all kinds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import timm.layers
import torch
from torch import Tensor, nn

from zoo.errors import DataError, OptionError
from zoo.fusion.grams import input_grams
from zoo.fusion.weights.regmean import regmean
from zoo.fusion.weights.regmean_plus_plus import regmean_plus_plus

State = dict[str, Tensor]


def states_of(make: Callable[[], nn.Module], count: int = 3) -> list[State]:
    states = []
    for seed in range(count):
        torch.manual_seed(seed)
        states.append({key: tensor.clone() for key, tensor in make().state_dict().items()})
    return states


def fused(
    strategy: Callable[..., State], make: Callable[[], nn.Module], states: Sequence[State],
    data: Sequence[Tensor], share: Sequence[float] = (1.0, 1.0, 1.0), **options: Any,
) -> State:
    weights = {key: share[:len(states)] for key, tensor in states[0].items()
               if tensor.is_floating_point() and "running" not in key}
    with torch.no_grad():
        return strategy(states, weights=weights, module=make().eval(), data=data, **options)


def regression(
    weights: Sequence[Tensor], inputs: Sequence[Tensor], share: Sequence[float], damping: float
) -> Tensor:
    """The paper's closed form, of [out, n] from [N, n]."""
    whole = right = torch.zeros((), dtype=torch.float64)
    for weight, x, part in zip(weights, inputs, share, strict=True):
        gram = part * x.double().T @ x.double() / len(x)
        gram = damping * gram + (1 - damping) * torch.diag(gram.diagonal())
        whole, right = whole + gram, right + gram @ weight.double().T
    return torch.linalg.solve(whole, right).T.float()


def images(*shape: int, batches: int = 3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=draw) for _ in range(batches)]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize("damping", [0.9, 0.5, 1.0])
@pytest.mark.parametrize("share", [(1.0, 1.0, 1.0), (1.0, 0.25, 2.0)])
def test_linear_layers_against_the_closed_form(damping: float, share: tuple[float, ...]) -> None:
    states, data = states_of(perceptron), images(40, 6)
    found = fused(regmean, perceptron, states, data, share, damping=damping)
    x = torch.cat(data)
    hidden = [(x @ state["0.weight"].T + state["0.bias"]).relu() for state in states]
    for key, inputs in (("0.weight", [x] * 3), ("2.weight", hidden)):
        expected = regression([state[key] for state in states], inputs, share, damping)
        torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-3)
    mean = sum(part * state["2.bias"] for part, state in zip(share, states, strict=True))
    torch.testing.assert_close(found["2.bias"], mean / sum(share))


def test_without_damping_the_answers_are_the_nearest_there_are() -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU()),
                             nn.Linear(7, 4, bias=False))

    states, data = states_of(layer), images(200, 5)
    found = fused(regmean, layer, states, data, damping=1.0)["1.weight"]
    inputs = [(torch.cat(data) @ state["0.0.weight"].T).relu() for state in states]

    def error(weight: Tensor) -> float:
        return sum(float((x @ (weight - state["1.weight"]).T).square().mean())
                   for x, state in zip(inputs, states, strict=True))

    best = error(found)
    draw = torch.Generator().manual_seed(0)
    assert all(error(found + 0.05 * torch.randn(4, 7, generator=draw)) > best for _ in range(20))
    assert best < 0.95 * error(torch.stack([state["1.weight"] for state in states]).mean(0))


def test_where_there_is_no_input_the_mean_stays() -> None:
    states, data = states_of(perceptron), images(40, 6)
    for state in states:
        state["0.weight"][:4], state["0.bias"][:4] = 0, -1  # units that are never active
    for batch in data:
        batch[:, 0] = 0
    found = fused(regmean, perceptron, states, data)
    mean = torch.stack([state["2.weight"] for state in states]).mean(0)
    torch.testing.assert_close(found["2.weight"][:, :4], mean[:, :4])
    assert not torch.allclose(found["2.weight"][:, 4:], mean[:, 4:], atol=1e-3)
    mean = torch.stack([state["0.weight"] for state in states]).mean(0)
    torch.testing.assert_close(found["0.weight"][:, 0], mean[:, 0])


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "padded and strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "oblong": lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(0, 1), bias=False),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, bias=False),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, groups=4, padding=2, bias=False),
    "same, by torch": lambda: nn.Conv2d(4, 6, 5, padding="same", bias=False),
    "valid, by torch": lambda: nn.Conv2d(4, 6, 4, padding="valid", bias=False),
    "same, by timm": lambda: timm.layers.Conv2dSame(4, 6, 3, stride=2, bias=False),
    "patches": lambda: nn.Conv2d(4, 6, 4, stride=4, bias=False),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_inputs_of_a_convolution_tell_the_size_of_its_answers(name: str) -> None:
    """‖XWᵀ‖² = N tr(W G Wᵀ), for weights that the Gram matrix has never met."""
    net = nn.Sequential(CONVOLUTIONS[name]())
    layer: Any = net[0]
    data = images(2, 4, 11, 12)
    gram = input_grams(net, net.state_dict(), ["0.weight"], data)["0.weight"]
    torch.manual_seed(1)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        answers = torch.cat([net(batch) for batch in data])
    weight = layer.weight.detach().double().reshape(layer.groups, -1, gram.shape[-1])
    places = len(answers) * answers[0, 0].numel()
    for group, part in enumerate(answers.chunk(layer.groups, 1)):
        own = weight[group] @ gram[group] @ weight[group].T
        assert float(part.double().square().sum()) == pytest.approx(
            places * float(own.trace()), rel=1e-5)


def test_patches_in_small_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), images(5, 4, 8, 8)
    whole = input_grams(net, net.state_dict(), ["0.weight"], data)
    monkeypatch.setattr("zoo.fusion.grams._PIECE", 1)
    torch.testing.assert_close(input_grams(net, net.state_dict(), ["0.weight"], data), whole)


def test_grouped_convolutions_are_regressed_in_each_group() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(),
                             nn.Conv2d(4, 6, 3, groups=2, bias=False))

    states, data = states_of(make), images(4, 4, 9, 9)
    found = fused(regmean, make, states, data)["2.weight"]
    for group in range(2):
        inputs = []
        for state in states:
            net: Any = make()
            net.load_state_dict(state)
            with torch.no_grad():
                maps = torch.cat([net[1](net[0](batch)) for batch in data])
            patches = maps[:, 2 * group:2 * group + 2].unfold(2, 3, 1).unfold(3, 3, 1)
            inputs.append(patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 18))
        rows = slice(3 * group, 3 * group + 3)
        expected = regression([state["2.weight"][rows].flatten(1) for state in states], inputs,
                              (1.0, 1.0, 1.0), 0.9)
        torch.testing.assert_close(found[rows].flatten(1), expected, rtol=1e-3, atol=1e-3)


def test_layers_that_do_something_else_with_their_weight_are_averaged() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.ScaledStdConv2d(4, 4, 3, padding=1),
                             nn.Conv2d(4, 4, 3))

    states, data = states_of(make), images(4, 3, 8, 8)
    found = fused(regmean, make, states, data)
    means = {key: torch.stack([state[key] for state in states]).mean(0) for key in states[0]}
    torch.testing.assert_close(found["1.weight"], means["1.weight"])
    assert not torch.allclose(found["2.weight"], means["2.weight"], atol=1e-3)


def test_tokens_and_layers_that_are_never_called() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(6, 2, batch_first=True)  # out_proj is never called
            self.fc = nn.Linear(6, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            answers: Tensor = self.fc(self.attn(tokens, tokens, tokens)[0])
            return answers

    states, data = states_of(Attention), images(8, 7, 6)
    found = fused(regmean, Attention, states, data)
    mean = torch.stack([state["attn.out_proj.weight"] for state in states]).mean(0)
    torch.testing.assert_close(found["attn.out_proj.weight"], mean)
    inputs = []
    for state in states:
        net = Attention()
        net.load_state_dict(state)
        with torch.no_grad():
            inputs.append(torch.cat([net.attn(x, x, x)[0].flatten(0, 1) for x in data]))
    expected = regression([state["fc.weight"] for state in states], inputs, (1.0,) * 3, 0.9)
    torch.testing.assert_close(found["fc.weight"], expected, rtol=1e-3, atol=1e-3)


class Blocks(nn.Module):
    """Two blocks of two layers with batch norm between, under names that tell their depth."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(OrderedDict(fc1=nn.Linear(6, 7), act=nn.ReLU(), fc2=nn.Linear(7, 6),
                                      norm=nn.BatchNorm1d(6))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_are_fed_by_the_merged_ones_before_them() -> None:
    states, data = states_of(Blocks), images(60, 6)
    for seed, state in enumerate(states):
        state["blocks.0.norm.running_mean"] += seed
        state["blocks.0.norm.running_var"] *= 1 + seed
    found = fused(regmean_plus_plus, Blocks, states, data, damping=0.95)
    x = torch.cat(data)

    def hidden(state: Mapping[str, Tensor], block: int, inputs: Tensor) -> Tensor:
        return (inputs @ state[f"blocks.{block}.fc1.weight"].T
                + state[f"blocks.{block}.fc1.bias"]).relu()

    for block in range(2):
        means = [state[f"blocks.{block}.fc1.weight"] for state in states]
        torch.testing.assert_close(found[f"blocks.{block}.fc1.weight"], torch.stack(means).mean(0),
                                   rtol=1e-4, atol=1e-4)
        expected = regression([state[f"blocks.{block}.fc2.weight"] for state in states],
                              [hidden(state, block, x) for state in states], (1.0,) * 3, 0.95)
        torch.testing.assert_close(found[f"blocks.{block}.fc2.weight"], expected,
                                   rtol=1e-3, atol=1e-3)
        # The merged block's answers, with its statistics pooled.
        y = hidden(found, block, x) @ found[f"blocks.{block}.fc2.weight"].T
        y = y + found[f"blocks.{block}.fc2.bias"]
        place = f"blocks.{block}.norm."
        centres = torch.stack([state[f"{place}running_mean"] for state in states])
        spreads = torch.stack([state[f"{place}running_var"] for state in states])
        spread = (spreads + (centres - centres.mean(0)) ** 2).mean(0)
        x = (y - centres.mean(0)) / (spread + 1e-5).sqrt() * found[f"{place}weight"]
        x = x + found[f"{place}bias"]


def test_a_network_of_no_known_depth_is_one_block() -> None:
    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(fc1=nn.Linear(6, 8), act=nn.ReLU(), fc2=nn.Linear(8, 4)))

    states, data = states_of(make), images(40, 6)
    torch.testing.assert_close(fused(regmean_plus_plus, make, states, data, damping=0.9),
                               fused(regmean, make, states, data, damping=0.9))
    # Single layers are blocks here, and get the mean: their inputs are the same.
    torch.testing.assert_close(
        fused(regmean_plus_plus, perceptron, states_of(perceptron), data),
        {key: torch.stack([state[key] for state in states_of(perceptron)]).mean(0)
         for key in perceptron().state_dict()}, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("strategy", "name"), [(regmean, "regmean"),
                                                (regmean_plus_plus, "regmean++")])
def test_bad_values_and_no_images(strategy: Callable[..., State], name: str) -> None:
    states, data = states_of(perceptron), images(40, 6)
    with pytest.raises(OptionError, match=rf"{name[:7]}.*: damping is 1.5, expected a factor in"):
        fused(strategy, perceptron, states, data, damping=1.5)
    with pytest.raises(OptionError, match=r"the weights \(1.0, -1.0, 1.0\) of .* are no shares"):
        fused(strategy, perceptron, states, data, (1.0, -1.0, 1.0))
    with pytest.raises(DataError, match="there are no images to measure the layers' inputs on"):
        fused(strategy, perceptron, states, [])
