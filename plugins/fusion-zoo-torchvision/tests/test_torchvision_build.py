"""Weights, sizes, channels and heads, and torchvision's networks inside zoo's models."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings

import zoo
from zoo.backbones import Preprocessing
from zoo.errors import OptionError, WeightsError
from zoo.testing import run_checks
from zoo_torchvision.build import build

Publish = Callable[..., Path]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Publish a state as an entry's weights: torch fetches and checks it by its real URL."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def _publish(entry: Any, state: Any, *, digits: str = "") -> Path:
        file = tmp_path / "weights.pth"
        torch.save(state, file)
        digits = digits or hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        file = file.rename(tmp_path / f"weights-{digits}.pth")
        monkeypatch.setattr(entry.value, "url", file.as_uri())
        return file

    return _publish


def net_of(name: str, **arguments: Any) -> Any:
    given: dict[str, Any] = {"num_classes": None, "pretrained": False, **arguments}
    return build(name=name, **given).eval()


def state_of(name: str, **arguments: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = models.get_model(name, weights=None, **arguments).state_dict()
    return state


SMALL = models.MobileNet_V3_Small_Weights.IMAGENET1K_V1


@torch.no_grad()
def test_pretrained_loads_what_is_published(
    publish: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of("mobilenet_v3_small")
    file = publish(SMALL, state)
    net = net_of("mobilenet_v3_small", pretrained=True)
    assert net.state_dict().keys() == state.keys()
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in state.items())
    assert net.source == {"url": file.as_uri(),
                          "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert capsys.readouterr().out == ""
    file.unlink()  # torch has it in its cache now
    again = net_of("mobilenet_v3_small.IMAGENET1K_V1", pretrained=True, num_classes=4)
    x = torch.randn(1, 3, 32, 32)
    assert again(x).shape == (1, 4)
    assert torch.equal(again.features(x), net.features(x))


def test_an_entry_has_its_own_weights(publish: Publish) -> None:
    state = {key: torch.zeros_like(tensor) for key, tensor in state_of("mobilenet_v2").items()}
    publish(models.MobileNet_V2_Weights.IMAGENET1K_V1, state)
    net = net_of("mobilenet_v2.IMAGENET1K_V1", pretrained=True)
    assert not any(tensor.any() for tensor in net.state_dict().values())


def test_a_pretrained_inception_loses_its_auxiliary_heads(publish: Publish) -> None:
    state = state_of("googlenet", init_weights=False)
    assert any(key.startswith("aux1.") for key in state)
    publish(models.GoogLeNet_Weights.DEFAULT, state)
    kept = net_of("googlenet", pretrained=True).state_dict()
    assert kept.keys() == {key for key in state if not key.startswith("aux")}
    assert all(torch.equal(tensor, state[key]) for key, tensor in kept.items())


def test_densenets_older_keys_are_understood(publish: Publish) -> None:
    state = state_of("densenet121")
    older = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.")
             if "denselayer" in key else key: tensor for key, tensor in state.items()}
    assert older.keys() != state.keys()
    publish(models.DenseNet121_Weights.DEFAULT, older)
    net = net_of("densenet121", pretrained=True)
    assert all(torch.equal(net.state_dict()[key], tensor) for key, tensor in state.items())


def test_weights_out_of_reach_are_an_error(
    tmp_path: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = (tmp_path / "nowhere-01234567.pth").as_uri()
    monkeypatch.setattr(SMALL.value, "url", url)
    with pytest.raises(WeightsError) as failed:
        zoo.backbone("torchvision/mobilenet_v3_small", pretrained=True)
    message = str(failed.value)
    assert message.startswith("the weights of torchvision/mobilenet_v3_small.IMAGENET1K_V1 cannot "
                              f"be had from {url} (<urlopen error ")
    assert message.endswith("or pass pretrained=False for random weights")
    assert "\n" not in message


def test_other_bytes_than_the_name_says_are_an_error(publish: Publish) -> None:
    publish(SMALL, {}, digits="01234567")
    with pytest.raises(WeightsError, match=r'invalid hash value \(expected "01234567", got "'):
        net_of("mobilenet_v3_small", pretrained=True)


def test_code_in_a_file_is_not_run(publish: Publish) -> None:
    publish(SMALL, {"features.0.0.weight": Path("harmless")})
    with pytest.raises(WeightsError, match=r"cannot be read \(Weights only load failed.*delete"):
        net_of("mobilenet_v3_small", pretrained=True)


def test_a_trunk_published_without_a_head_is_an_error() -> None:
    with pytest.raises(WeightsError, match=r"without values; choose torchvision/vgg16, or"):
        net_of("vgg16.IMAGENET1K_FEATURES", pretrained=True)


def registered(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A further torchvision model, `resnet10`, without weights."""

    class NoWeights(models.WeightsEnum):
        pass

    def resnet10(*, weights: NoWeights | None = None, **arguments: Any) -> nn.Module:
        return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], **arguments)

    resnet10.__annotations__["weights"] = NoWeights
    resnet10.__module__ = module
    monkeypatch.setitem(models._api.BUILTIN_MODELS, "resnet10", resnet10)


def test_an_architecture_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "torchvision.models.resnet")
    with pytest.raises(WeightsError, match=r"^torchvision/resnet10 has no published weights; pa"):
        net_of("resnet10", pretrained=True)
    assert net_of("resnet10").preprocessing == Preprocessing()


def test_a_family_of_a_newer_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    registered(monkeypatch, "torchvision.models.mamba")
    with pytest.raises(OptionError, match="family 'mamba' is newer than this plugin; upgrade"):
        net_of("resnet10")


def test_preprocessing_is_the_entrys() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert net_of("efficientnet_b1.IMAGENET1K_V1").preprocessing == Preprocessing(
        mean, std, (240, 240), "bicubic")
    assert net_of("efficientnet_b1").preprocessing == Preprocessing(
        mean, std, (240, 240), "bilinear")
    assert net_of("resnet18", image_size=64).preprocessing.size == (64, 64)


def test_labels_are_imagenets_synsets_in_torchvisions_order() -> None:
    labels = net_of("resnet18").label_names
    assert len(set(labels)) == 1000
    imagenet = ImageNetInfo("imagenet-1k")
    categories = models.ResNet18_Weights.DEFAULT.meta["categories"]
    described = [imagenet.label_name_to_description(label, detailed=True) for label in labels]
    differ = [name for name, text in zip(categories, described, strict=True) if name not in text]
    assert differ == ["crane bird", "maillot tank suit"]  # told apart from others by a word more
    assert not hasattr(net_of("resnet18", num_classes=4), "label_names")


@torch.no_grad()
def test_other_channels_adapt_the_first_layer(publish: Publish) -> None:
    state = state_of("mobilenet_v3_small")
    publish(SMALL, state)
    published = state["features.0.0.weight"]
    grey = net_of("mobilenet_v3_small", pretrained=True, in_chans=1)
    torch.testing.assert_close(grey.features[0][0].weight, published.sum(1, keepdim=True))
    assert grey.preprocessing.mean == pytest.approx((0.449,), abs=1e-3)
    five = net_of("mobilenet_v3_small", pretrained=True, in_chans=5)
    torch.testing.assert_close(
        five.features[0][0].weight, torch.cat([published, published[:, :2]], 1) * 0.6)
    assert five(torch.randn(1, 5, 32, 32)).shape == (1, 1000)


@torch.no_grad()
def test_a_vit_of_another_size_has_interpolated_positions(publish: Publish) -> None:
    state = state_of("vit_b_32")
    state["encoder.pos_embedding"].normal_()
    publish(models.ViT_B_32_Weights.DEFAULT, state)
    net = net_of("vit_b_32", pretrained=True, image_size=96, num_classes=3)
    expected = interpolate_embeddings(96, 32, dict(state))["encoder.pos_embedding"]
    assert torch.equal(net.encoder.pos_embedding, expected)
    assert net(torch.randn(1, 3, 96, 96)).shape == (1, 3)


@pytest.mark.parametrize(("name", "side", "said"), [
    ("vit_b_32", 100, r"image_size is 100, expected a multiple of 32 pixels"),
    ("maxvit_t", 112, r"image_size is 112, expected a multiple of 224 pixels"),
    ("resnet18", 0, r"image_size is 0, expected pixels"),
    ("densenet121", 16, r"image_size is 16, which it cannot take \(.*\); give it 29 pixels or"),
    ("inception_v3", 64, r"cannot take \(.*\); give it 75 pixels or more$"),
])
def test_sizes_that_a_network_cannot_take(name: str, side: int, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        net_of(name, image_size=side)


def test_dropout_is_an_option_where_there_is_one() -> None:
    net = net_of("mobilenet_v3_small", drop_rate=0.5)
    assert [layer.p for layer in net.classifier if isinstance(layer, nn.Dropout)] == [0.5]
    with pytest.raises(OptionError, match=r"resnet18\.\w+: this architecture has no dropout"):
        zoo.backbone("torchvision/resnet18", drop_rate=0.1)
    with pytest.raises(OptionError, match=r"drop_rate is 1.0, expected a share in \[0, 1\)"):
        net_of("mobilenet_v3_small", drop_rate=1.0)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1"])
def test_conforms(name: str) -> None:
    for outcome in run_checks("torchvision", names=[name]):
        assert outcome.state == "passed", f"{outcome.check.name}: {outcome.reason}"


@pytest.mark.parametrize(("name", "options"), [
    ("mnasnet0_5", {}), ("squeezenet1_1", {"drop_rate": 0.1}), ("densenet121", {"in_chans": 1}),
    ("swin_v2_t", {}), ("vit_b_32", {}),
])
def test_saved_and_loaded_it_answers_the_same(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = zoo.backbone(f"torchvision/{name}", num_classes=3, image_size=32, device="cpu",
                         **options).eval()
    images = torch.rand(2, 3, 40, 40)
    loaded = zoo.load(zoo.save(model, tmp_path / "out"), device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        assert torch.equal(loaded.embed(images), model.embed(images))
    assert loaded.name.startswith(f"torchvision/{name}.IMAGENET1K_")


def test_fused_with_timm_trained_saved_and_loaded(tmp_path: Path) -> None:
    members = [zoo.backbone(name, num_classes=10, image_size=32, device="cpu", seed=0)
               for name in ("torchvision/shufflenet_v2_x0_5", "timm/test_resnet",
                            "torchvision/squeezenet1_1")]
    both = zoo.fuse(members, "concat", num_classes=10)
    assert both.dim == sum(model.dim for model in members)
    before = both.state_dict()["head.weight"].clone()
    result = zoo.transfer(both, zoo.load_data("digits", role="train").take(200), "linear_probe",
                          epochs=1)
    assert result.model is both
    assert not torch.equal(both.state_dict()["head.weight"], before)
    loaded = zoo.load(zoo.save(both, tmp_path / "both"), device="cpu")
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), both.eval()(images))


def test_answers_are_averaged_with_timms_over_the_same_labels() -> None:
    members = [zoo.backbone(name, image_size=32, device="cpu")
               for name in ("torchvision/mobilenet_v3_small", "timm/test_resnet")]
    assert members[0].classes == members[1].classes
    assert zoo.fuse(members, "mean").classes == members[0].classes


def test_weights_fuse_within_an_architecture() -> None:
    a, b = (zoo.backbone("torchvision/squeezenet1_1", num_classes=3, image_size=32, seed=seed,
                         device="cpu") for seed in (0, 1))
    fused = zoo.fuse([a, b], "average").state_dict()
    for key, tensor in a.state_dict().items():
        torch.testing.assert_close(fused[key], (tensor + b.state_dict()[key]) / 2)
