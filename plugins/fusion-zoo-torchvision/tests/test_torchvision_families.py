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


def reference(name: str, size: int) -> nn.Module:
    """torchvision's own network, with a head that is not zero and norms that are not fresh."""
    arguments: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        arguments["init_weights"] = False
    if name.startswith("vit"):
        arguments["image_size"] = size
    torch.manual_seed(0)
    net: nn.Module = models.get_model(name, weights=None, **arguments).eval()
    for key, tensor in net.state_dict().items():
        if key.endswith("running_mean") or key == "heads.head.weight":
            tensor.normal_(std=0.1)
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
    state = {key: tensor for key, tensor in theirs.state_dict().items()
             if not key.startswith(("aux", "AuxLogits"))}
    net = taken_apart(name, state, size)
    x = torch.randn(2, 3, size, size)
    logits = theirs(x)
    assert logits.std() > 0
    assert torch.equal(net(x), logits)
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
    theirs: Any = reference(name, 75)
    theirs.transform_input = True  # what torchvision sets for the pretrained ones
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "ux" not in key}
    net = taken_apart(name, state, 75)
    images = torch.rand(1, 3, 75, 75)
    wanted = models.get_model_weights(name).DEFAULT.transforms()
    expected = theirs((images - torch.tensor(wanted.mean).view(3, 1, 1))
                      / torch.tensor(wanted.std).view(3, 1, 1))
    mean, std = (torch.tensor(numbers).view(3, 1, 1)
                 for numbers in (net.preprocessing.mean, net.preprocessing.std))
    torch.testing.assert_close(net((images - mean) / std), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1"])
def test_compiles_whole(name: str) -> None:
    net = build(name=name, num_classes=3, pretrained=False, image_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
