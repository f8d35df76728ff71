"""Every activation of a network for another; gates stay."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from zoo.backbones.activations import ACTIVATIONS, swap_activations
from zoo.errors import OptionError


def kinds(net: nn.Module) -> set[str]:
    return {type(module).__name__ for module in net.modules()}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_nothing_else_bends_a_relu_network(name: str) -> None:
    net = timm.create_model(name, num_classes=4).eval()
    count = swap_activations(net, "relu")
    assert count == sum(isinstance(module, nn.ReLU) for module in net.modules())
    assert not kinds(net) & {"GELU", "SiLU", "Hardswish"}
    assert net(torch.rand(1, 3, 160, 160)).isfinite().all()


def test_gates_stay() -> None:
    net = timm.create_model("mobilenetv3_small_050", num_classes=4)
    before = sum(isinstance(module, nn.Hardsigmoid) for module in net.modules())
    swap_activations(net, "gelu")
    assert before == sum(isinstance(module, nn.Hardsigmoid) for module in net.modules()) > 0
    assert "Hardswish" not in kinds(net)


def test_an_activation_that_stands_in_two_places_is_replaced_in_both() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(2, 2), act, nn.Linear(2, 2), act)
    assert swap_activations(net, "tanh") == 2
    assert [type(net[place]).__name__ for place in (1, 3)] == ["Tanh", "Tanh"]


def test_an_activation_with_parameters_has_the_dtype_of_the_network() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to(torch.float64)
    swap_activations(net, "prelu")
    assert net(torch.rand(1, 2, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_name_works(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    swap_activations(net, name)
    assert net(torch.rand(1, 2)).isfinite().all()


def test_unknown_names_and_networks_without_activations_are_errors() -> None:
    with pytest.raises(OptionError, match=r"no activation is called 'rellu'; did you mean 'relu'?"):
        swap_activations(nn.Sequential(nn.ReLU()), "rellu")
    with pytest.raises(OptionError, match="Linear has no activation modules to swap"):
        swap_activations(nn.Linear(2, 2), "relu")
