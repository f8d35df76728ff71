"""Images on [0, 1] in, logits out: every family, every channel count, every way of running."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo.errors import DataError, FusionError, ZooError
from zoo.member import Member
from zoo.model import Model

LETTERS = ("a", "b", "c", "d")
# One small network of each kind of trunk, and the side it looks at.
SMALL = {"test_resnet": 32, "test_vit": 32, "test_convnext": 32, "test_efficientnet": 32}
FAMILIES = {"vgg11": 32, "resnet18": 32, "inception_v3": 75, "vit_tiny_patch16_224": 64,
            "convnext_atto": 32}
ODD = {"deit_tiny_distilled_patch16_224": 32}  # its logits are the mean of two classifiers'


def build(name: str = "test_resnet", **arguments: Any) -> Model:
    side = {**SMALL, **FAMILIES, **ODD}.get(name)
    given = {"classes": LETTERS, "seed": 0, "device": "cpu", "image_size": side, **arguments}
    return zoo.backbone(name, **given)


def images(channels: int = 3, height: int = 40, width: int = 33, count: int = 2) -> Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """One model of each way of fusing, and a fusion of fusions."""
    resnet, vit, odd = build(), build("test_vit"), build("deit_tiny_distilled_patch16_224")
    concat = zoo.fuse([resnet, vit], "concat")
    weighted = zoo.fuse([build("test_convnext", classes=LETTERS[::-1]), concat], "weighted")
    fit(weighted)
    return {
        "single": resnet,
        "concat": concat,
        "gated": zoo.fuse([resnet, vit], "gated"),
        "attention": zoo.fuse([resnet, vit], "attention"),
        "aff": zoo.fuse([resnet, vit], "aff"),
        "weighted": weighted,
        "nested": zoo.fuse([weighted, resnet], "mean"),
        "odd": odd,
        "mean of odd": zoo.fuse([odd, resnet], "mean"),
    }


def fit(model: Model) -> None:
    fuser: Any = model.fuser
    logits = torch.stack(model.answers(images(count=8))).detach()
    fuser.fit(logits, torch.arange(8) % 4)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_build_embed_and_fuse(name: str) -> None:
    model = build(name)
    fused = zoo.fuse([model, build("mnist_cnn")], "concat", num_classes=3)
    with torch.no_grad():
        assert torch.allclose(model.classify(model.embed(images())), model(images()), atol=1e-5)
        assert fused.embed(images()).shape == (2, model.dim + 100)
        assert fused(images()).shape == (2, 3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(name: str, channels: int) -> None:
    model = build(name, in_chans=channels)
    assert model.in_chans == channels
    with torch.no_grad():
        logits = model(images(channels))
        assert torch.allclose(model.classify(model.embed(images(channels))), logits, atol=1e-5)
    with pytest.raises(DataError, match=f"images have 2 channels, the model takes {channels}"):
        model(images(2))


def test_same_pixels_give_the_same_logits_as_timm() -> None:
    model = build("resnet18")
    x = images(height=32, width=32)
    mean, std = (torch.tensor(values).view(3, 1, 1)
                 for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    net = next(model.each_member()).net
    with torch.no_grad():
        assert torch.equal(model(x), net((x - mean) / std))


def test_members_resize_for_themselves() -> None:
    fused = zoo.fuse([build("inception_v3"), build("vit_tiny_patch16_224"), build("mnist_cnn")],
                     "concat")
    assert [member.size for member in fused.each_member()] == [75, 64, 28]
    assert fused.image_size == 75
    x = images(height=75, width=75)
    with torch.no_grad():
        parts = fused.trunk(x)
        small = functional.interpolate(x, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
        assert torch.equal(parts[2], build("mnist_cnn").embed(small))


def test_grey_and_colour_are_made_of_each_other() -> None:
    colour, grey = build(in_chans=3), build(in_chans=1)
    with torch.no_grad():
        assert torch.equal(colour(images(1)), colour(images(1).expand(-1, 3, -1, -1)))
        assert torch.allclose(grey(images(1).expand(-1, 3, -1, -1)), grey(images(1)), atol=1e-5)


def test_images_of_8_bits_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"images are uint8 \[2, 3, 8, 8\], expected float .*"
                                        "divide 8-bit images by 255"):
        build()(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"float32 \[3, 8, 8\]"):
        build()(torch.zeros(3, 8, 8))


@pytest.mark.parametrize("name", ["single", "nested", "mean of odd"])  # with all others inside
def test_compiles_to_one_graph(models: dict[str, Model], name: str) -> None:
    compiled = torch.compile(models[name], backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images()), models[name](images()), atol=1e-6)


@pytest.mark.parametrize("name", ["single", "concat", "gated", "attention", "aff", "weighted",
                                  "nested", "odd", "mean of odd"])
class TestEveryKind:
    def test_runs_under_inference_mode_and_autocast(
        self, models: dict[str, Model], name: str
    ) -> None:
        model = models[name]
        with torch.inference_mode():
            expected = model(images())
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.allclose(model(images()).float(), expected, atol=0.1)

    def test_logits_are_the_classifier_of_the_embedding(
        self, models: dict[str, Model], name: str
    ) -> None:
        model = models[name]
        with torch.no_grad():
            embedding = model.embed(images())
            assert embedding.shape == (2, model.dim)
            if model.splits:
                logits = model.classify(embedding)
                assert torch.allclose(logits, model(images()), atol=1e-6)
            else:
                with pytest.raises(ZooError, match=r"deit_tiny.* are not its classifier's answer"):
                    model.classify(embedding)

    def test_bfloat16_keeps_the_statistics_in_float32(
        self, models: dict[str, Model], name: str
    ) -> None:
        half = copy.deepcopy(models[name]).to(torch.bfloat16)
        for member in half.modules():
            if isinstance(member, Member) and member.preprocessing:
                assert member.mean.dtype == member.std.dtype == torch.float32
                assert member.mean.flatten().tolist() == pytest.approx(
                    member.preprocessing.mean, abs=1e-7)
        with torch.no_grad():
            assert half.embed(images()).dtype == torch.bfloat16
            assert torch.allclose(half(images()).float(), models[name](images()), atol=0.2)

    def test_copies_are_independent_and_equal(self, models: dict[str, Model], name: str) -> None:
        model = models[name]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            assert torch.equal(twin(images()), model(images()))
            before = model(images())
            for parameter in twin.parameters():
                parameter.zero_()
            assert torch.equal(model(images()), before)

    def test_the_state_holds_parameters_and_the_networks_own_buffers(
        self, models: dict[str, Model], name: str
    ) -> None:
        names = [key.rpartition(".")[2] for key in models[name].state_dict()]
        assert not {"mean", "std", "_follows"} & set(names)


def test_a_copy_keeps_modes_and_what_trains() -> None:
    model = build()
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    norms[0].eval()
    next(model.parameters()).requires_grad_(False)
    twin = copy.deepcopy(model)
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in twin.parameters()] == [
        p.requires_grad for p in model.parameters()]


def test_members_of_different_precision_fuse() -> None:
    half, full = build().to(torch.bfloat16), build("test_vit")
    for strategy in ("concat", "mean"):
        fused = zoo.fuse([half, full], strategy)
        with torch.no_grad():
            assert fused(images()).dtype == torch.float32


def test_classes_in_another_order_are_matched_by_name() -> None:
    one, other = build(), build(classes=LETTERS[::-1])
    net, twin = (next(model.each_member()).net for model in (one, other))
    state = net.state_dict()
    twin.load_state_dict({key: tensor.flip(0) if key.startswith("fc.") else tensor
                          for key, tensor in state.items()})
    fused = zoo.fuse([one, other], "mean")
    with torch.no_grad():
        assert torch.allclose(fused(images()), one(images()).log_softmax(1), atol=1e-6)
        for answer in fused.answers(images()):
            assert torch.allclose(answer, one(images()), atol=1e-6)


def test_a_fusion_of_outputs_keeps_its_heads() -> None:
    fused = zoo.fuse([build(), build("test_vit")], "mean")
    with pytest.raises(FusionError, match=r"heads of their own, for 4 other classes.*Train each"):
        fused.reset_classes(("x", "y"))
    assert fused.classes == LETTERS


def test_a_fresh_head_has_the_device_and_dtype_of_the_model() -> None:
    for model in (build(), zoo.fuse([build(), build("test_vit")], "concat")):
        model.to(torch.float64)
        model.reset_classes(("x", "y"))
        with torch.no_grad():
            assert model(images()).shape == (2, 2)
            assert model(images()).dtype == torch.float64


def test_the_head_is_what_comes_after_the_pooled_features() -> None:
    model = build()
    assert sum(p.numel() for p in model.head_parameters()) == 4 * (model.dim + 1)
    fused = zoo.fuse([model, build("test_vit")], "mean")
    assert sum(p.numel() for p in fused.head_parameters()) == 4 * (fused.dim + 2)
