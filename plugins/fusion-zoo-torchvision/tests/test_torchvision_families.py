"""Every family against torchvision's own forward, and with timm's semantics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torchvision import models

from zoo_torchvision.build import build
from zoo_torchvision.families import FAMILIES

# One small member of each family (of some, two that differ), and a small size that it takes.
SMALL = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32,
    "efficientnet_v2_s": 32, "googlenet": 32, "inception_v3": 75, "maxvit_t": 224,
    "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_y_400mf": 32,
    "resnet18": 32, "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32,
    "swin_t": 32, "swin_v2_t": 32, "vgg11": 32, "vit_b_32": 32,
}


@torch.no_grad()
def reference(name: str, size: int) -> Any:
    """torchvision's own network as it is after loading weights: no auxiliary heads, a head that is
    not zero, and norms that keep the signal alive."""
    arguments: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if name.startswith("vit"):
        arguments["image_size"] = size
    torch.manual_seed(0)
    net: Any = models.get_model(name, weights=None, **arguments).eval()
    if arguments.get("init_weights") is False:
        net.aux_logits = False
        net.aux1 = net.aux2 = net.AuxLogits = None
    if name.startswith("vit"):
        net.heads.head.weight.normal_()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    net(torch.randn(2, 3, size, size))
    for norm in norms:
        norm.eval()
    return net


def taken_apart(name: str, state: dict[str, Tensor], size: int) -> Any:
    with init_empty_weights():
        net = build(name=name, num_classes=None, pretrained=False, image_size=size)
    net.load_state_dict(state, assign=True)
    return net.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_answers_and_keys_are_torchvisions(name: str) -> None:
    size = SMALL[name]
    theirs = reference(name, size)
    # MNASNet refuses states without a version, so the keys go this way and not back.
    net = taken_apart(name, theirs.state_dict(), size)
    x = torch.randn(2, 3, size, size)
    logits = theirs(x)
    assert (logits[0] - logits[1]).std() > 0
    assert torch.equal(net(x), logits)
    torch.manual_seed(1)
    trained = theirs.train()(x)
    torch.manual_seed(1)
    assert torch.equal(net.train()(x), trained)  # the same dropout, too
    net.eval()
    logits = net(x)
    features = net.forward_features(x)
    assert torch.equal(net.forward_head(features), logits)
    assert features.shape[1 if features.ndim == 4 else 2] == net.num_features
    pooled = net.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, net.head_hidden_size)
    if not name.startswith("squeezenet"):  # it averages after its classifier
        assert torch.equal(net.get_classifier()(pooled), logits)
    net.reset_classifier(0)
    assert torch.equal(net(x), pooled)
    net.reset_classifier(5)
    assert net(x).shape == (2, 5)
    assert net.num_classes == 5
    assert torch.equal(net.forward_head(net.forward_features(x), pre_logits=True), pooled)
    fresh = net.get_classifier()
    assert (fresh.bias is None) == (name == "maxvit_t")
    assert any(fresh.weight is parameter for parameter in net.parameters())


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_every_registered_classifier_is_taken_apart(name: str) -> None:
    with init_empty_weights():
        net: Any = build(name=name, num_classes=7, pretrained=False, in_chans=5)
    stem = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    assert stem.in_channels == len(net.preprocessing.mean) == 5
    assert net.get_classifier().weight.shape[:2] == (7, net.head_hidden_size)
    side = models.get_model_weights(name).DEFAULT.transforms().crop_size[0]
    assert net.preprocessing.size == (side, side)


def test_every_family_has_a_small_member() -> None:
    assert {models.get_model_builder(name).__module__.rpartition(".")[2] for name in SMALL} == (
        FAMILIES.keys())


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 75)])
def test_the_inceptions_train_on_logits_alone(name: str, size: int) -> None:
    net = build(name=name, num_classes=3, pretrained=False, image_size=size).train()
    logits = net(torch.randn(2, 3, size, size))
    assert isinstance(logits, Tensor)
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not any("aux" in key.lower() for key in net.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_the_inceptions_own_normalisation_is_in_their_preprocessing(name: str) -> None:
    theirs = reference(name, 75)
    net = taken_apart(name, theirs.state_dict(), 75).double()
    theirs.double().transform_input = True  # what torchvision sets for the pretrained ones
    images = torch.rand(1, 3, 75, 75, dtype=torch.float64)

    def normalised(by: Any) -> Tensor:
        mean, std = (torch.tensor(numbers, dtype=torch.float64).view(3, 1, 1)
                     for numbers in (by.mean, by.std))
        return (images - mean) / std

    wanted = models.get_model_weights(name).DEFAULT.transforms()
    torch.testing.assert_close(net(normalised(net.preprocessing)), theirs(normalised(wanted)))
