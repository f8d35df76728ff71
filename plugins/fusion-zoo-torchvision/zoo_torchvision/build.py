"""Build torchvision's classifiers, with their published weights or without."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from timm.data import ImageNetInfo
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torchvision.models import get_model, get_model_builder, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

from zoo.backbones import Preprocessing
from zoo.errors import OptionError, WeightsError
from zoo_torchvision.families import FAMILIES, Classifier

_INCEPTIONS = ("googlenet", "inception")


def build(
    *,
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    drop_rate: float | None = None,
) -> nn.Module:
    """A torchvision classifier, with its `preprocessing`, its `label_names` and the `source` of
    its weights.

    name: torchvision's, with an entry of its weights enum or without (`resnet50.IMAGENET1K_V2`).
    num_classes: of a fresh head; None keeps torchvision's. in_chans: other than 3, the first
    layer's weights are repeated or summed, as timm does. image_size: side of the square it looks
    at, by default that of the weights.
    Raises WeightsError when the weights cannot be had, OptionError for a size or an option that
    the network cannot take.

    Options:
        drop_rate: dropout in the head, in [0, 1); null is the architecture's own
    """
    owner = f"torchvision/{name}"
    architecture, _, entry = name.partition(".")
    family = get_model_builder(architecture).__module__.rpartition(".")[2]
    if family not in FAMILIES:
        raise OptionError(owner, f"torchvision's family {family!r} is newer than this plugin; "
                          "upgrade fusion-zoo-torchvision")
    entries = get_model_weights(architecture)
    weights: Any = entries[entry or "DEFAULT"] if len(entries) else None
    state, source = _fetch(owner, architecture, weights) if pretrained else ({}, {})
    native = _preprocessing(family, weights)
    preprocessing = native if image_size is None else native.at(image_size)
    side = preprocessing.size[0]
    net = get_model(architecture, weights=None, **_arguments(owner, architecture, family, side))
    if pretrained:
        if family == "vision_transformer":
            state = interpolate_embeddings(side, net.patch_size, state)
        net.load_state_dict(state)
    if in_chans != 3:
        _adapt_stem(net, in_chans, copies=pretrained)
    classifier: Any = FAMILIES[family](net)
    if num_classes not in (None, classifier.num_classes):
        classifier.reset_classifier(num_classes)
    if drop_rate is not None:
        _set_dropout(owner, classifier, drop_rate)
    if side < native.size[0]:
        _want_size(owner, classifier, in_chans, side, weights)
    classifier.preprocessing = preprocessing.for_channels(in_chans)
    if classifier.num_classes == 1000:
        classifier.label_names = tuple(ImageNetInfo("imagenet-1k").label_names())
    classifier.source = source
    return classifier  # type: ignore[no-any-return]


def _fetch(
    owner: str, architecture: str, weights: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The published state under today's keys, and where it comes from."""
    if weights is None:
        raise WeightsError(f"{owner} has no published weights; pass pretrained=False for random "
                           "weights")
    if weights.meta["categories"] is None:
        raise WeightsError(f"{owner} is a trunk whose head was published without values; choose "
                           f"torchvision/{architecture}, or pass pretrained=False")
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(weights.url).path).name)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch prints that it downloads
            state = weights.get_state_dict(
                progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except Exception as error:  # of the network, of the disk, of zip files, of pickles
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if file.is_file():
            raise WeightsError(f"{file}, the weights of {owner}, cannot be read ({reason}); delete "
                               "the file to have it fetched again") from error
        raise WeightsError(
            f"the weights of {owner} cannot be had from {weights.url} ({reason}); check the "
            "network, fetch them once while online (they are cached), or pass pretrained=False "
            "for random weights") from error
    for key in list(state):  # DenseNet's files are older than the rule of no dots in names
        state[re.sub(r"(denselayer\d+\.[a-z]+)\.([12])\.", r"\1\2.", key)] = state.pop(key)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return state, {"url": weights.url, "sha256": sha256}


def _preprocessing(family: str, weights: Any) -> Preprocessing:
    if weights is None:
        return Preprocessing()
    wanted = weights.transforms()
    mean, std = tuple(wanted.mean), tuple(wanted.std)
    if family in _INCEPTIONS:
        # torchvision normalises for ImageNet and then, inside, turns that into these.
        mean, std = (0.5,) * 3, (0.5,) * 3
    side = wanted.crop_size[0]
    return Preprocessing(mean, std, (side, side), wanted.interpolation.value)


def _arguments(owner: str, architecture: str, family: str, side: int) -> dict[str, Any]:
    """What torchvision's builder must be told: two families are built for one size, and two warn
    unless they are told how to initialise."""
    step = 1
    arguments: dict[str, Any] = {}
    if family == "vision_transformer":
        step, arguments = int(architecture.rpartition("_")[2]), {"image_size": side}
    elif family == "maxvit":  # windows of 7 × 7 at a 32nd of the resolution
        step, arguments = 224, {"input_size": (side, side)}
    elif family in _INCEPTIONS:
        arguments = {"init_weights": False}
    if side < 1 or side % step:
        expected = "pixels" if step == 1 else f"a multiple of {step} pixels"
        raise OptionError(owner, f"image_size is {side}, expected {expected}")
    return arguments


def _adapt_stem(net: nn.Module, in_chans: int, *, copies: bool) -> None:
    """Give the first convolution another number of channels, with its adapted weights or fresh
    ones."""
    name, stem = next((name, module) for name, module in net.named_modules()
                      if isinstance(module, nn.Conv2d))
    shape: Any = {part: getattr(stem, part) for part in ("kernel_size", "stride", "padding")}
    fresh = nn.Conv2d(in_chans, stem.out_channels, bias=stem.bias is not None, **shape)
    if copies:
        fresh.weight = nn.Parameter(adapt_input_conv(in_chans, stem.weight.detach()))
        fresh.bias = stem.bias
    net.set_submodule(name, fresh)


def _set_dropout(owner: str, net: Classifier, rate: float) -> None:
    layers = [layer for layer in net.head_layers() if isinstance(layer, nn.Dropout)]
    if not layers:
        raise OptionError(owner, "this architecture has no dropout in its head; leave drop_rate "
                          "out")
    if not 0 <= rate < 1:
        raise OptionError(owner, f"drop_rate is {rate}, expected a share in [0, 1)")
    for layer in layers:
        layer.p = rate


@torch.no_grad()
def _want_size(owner: str, net: nn.Module, in_chans: int, side: int, weights: Any) -> None:
    """Try one blank image: a size may leave nothing for the last layers."""
    if next(net.parameters()).is_meta:
        return  # built without weights, which a file will bring: it cannot run yet
    try:
        net.eval()(torch.zeros(1, in_chans, side, side))
    except RuntimeError as error:
        raise OptionError(owner, f"image_size is {side}, which it cannot take ({error}); give it "
                          f"{weights.meta['min_size'][0]} pixels or more") from error
    finally:
        net.train()
