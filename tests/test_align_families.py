"""The gate of permutations, for a network of each family: permuted, it computes what it did."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.vgg import VGG
from torch import Tensor, nn

from zoo.fusion.align import Graph, permute, trace

# vgg11 with a fraction of its channels, which has the same layers.
NARROW = [8, "M", 16, "M", 32, 32, "M", 32, 32, "M", 32, 32, "M"]
# Name, side of the image, options; the fraction of matrix axes that groups move, at least.
FAMILIES: list[tuple[str, int, dict[str, Any], float]] = [
    ("resnet18", 32, {}, 0.95),
    ("resnet50", 32, {}, 0.98),
    # A grouped convolution's inputs keep their order in their group.
    ("resnext50_32x4d", 32, {"layers": (1, 1, 1, 1)}, 0.8),
    ("seresnet50", 32, {"layers": (1, 1, 1, 1)}, 0.95),
    ("vgg", 32, {"cfg": NARROW, "mlp_ratio": 0.02}, 0.85),
    ("vgg_bn", 32, {"cfg": NARROW, "mlp_ratio": 0.02, "norm_layer": nn.BatchNorm2d}, 0.85),
    ("convnext_atto", 32, {}, 0.97),
    ("convnextv2_atto", 32, {}, 0.97),
    ("tf_efficientnet_lite0", 32, {}, 0.97),
    ("test_efficientnet_gn", 32, {}, 0.94),
    ("mobilenetv3_small_100", 32, {}, 0.97),
    ("vit_tiny_patch16_224", 32, {"img_size": 32}, 0.97),
    ("test_vit2", 32, {"img_size": 32}, 0.95),  # layer scale
    ("test_vit3", 32, {"img_size": 32}, 0.95),  # norms of queries and keys, attention pooling
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 3},
     0.8),  # tables of relative positions have an axis that is none of units
    ("swin_tiny_patch4_window7_224", 56, {"img_size": 56, "depths": (2, 2), "num_heads": (3, 6)},
     0.85),
    ("inception_v3", 75, {}, 0.98),
    ("densenet121", 32, {}, 0.99),
    ("mixer_s32_224", 64, {"img_size": 64}, 0.5),  # tokens keep their order
]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def random_state(net: nn.Module) -> dict[str, Tensor]:
    """float64, with nothing left at 0 or 1 that would hide a mistake."""
    draw = torch.Generator().manual_seed(3)
    state = {}
    for key, tensor in net.state_dict().items():
        if not tensor.is_floating_point():
            state[key] = tensor + 5
        elif tensor.dim() > 1:
            state[key] = tensor.double() + 0.02 * torch.randn(tensor.shape, generator=draw)
        else:
            state[key] = 0.5 + torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
    return state


def run(net: nn.Module, state: dict[str, Tensor], images: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(net, state, (images,))
    return out


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family[0])
def traced(request: pytest.FixtureRequest) -> tuple[nn.Module, Graph, Tensor, float]:
    name, side, options, least = request.param
    torch.manual_seed(0)
    build = VGG if name.startswith("vgg") else partial(timm.create_model, name, pretrained=False)
    net = build(num_classes=5, **options).eval()
    images = torch.randn(2, 3, side, side)
    return net, trace(net, images[:1]), images.double(), least


@torch.no_grad()
def test_a_permuted_network_computes_the_same(
    traced: tuple[nn.Module, Graph, Tensor, float]
) -> None:
    net, graph, images, least = traced
    state = random_state(net)
    permuted = permute(state, graph, graph.random(torch.Generator().manual_seed(7)))
    net = net.double()
    expected = run(net, state, images)
    assert expected.std() > 1e-3
    found = run(net, permuted, images)
    assert (found - expected).abs().max() <= 1e-8 * max(1.0, float(expected.abs().max()))

    changed = {key for key in state if not torch.equal(state[key], permuted[key])}
    parameters = dict(net.named_parameters())
    assert sum(parameters[key].numel() for key in changed & parameters.keys()) >= 0.98 * sum(
        parameter.numel() for parameter in parameters.values())
    running = {key for key in state if key.endswith(("running_mean", "running_var"))}
    assert running <= changed
    axes = {(key, axis) for key, tensor in parameters.items() if tensor.dim() > 1
            for axis in (0, 1) if tensor.shape[axis] > 1}
    assert len(axes & graph.moved()) >= least * len(axes)


@torch.no_grad()
def test_every_group_changes_the_output_when_a_place_is_left_out(
    traced: tuple[nn.Module, Graph, Tensor, float]
) -> None:
    net, graph, images, _ = traced
    net, state = net.double(), random_state(net)
    expected = run(net, state, images)
    groups = graph.groups[::max(1, len(graph.groups) // 5)]
    for group in groups:
        broken = Graph((dataclasses.replace(group, places=group.places[1:], parts=()),),
                       graph.shapes)
        order = torch.arange(group.size).roll(1)
        found = run(net, permute(state, broken, {group.name: order}), images)
        assert (found - expected).abs().max() > 1e-6 * expected.abs().max(), group.name
