"""Build timm's networks, with their published weights or without, and nothing in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

from zoo.backbones.preprocessing import Preprocessing
from zoo.errors import OptionError, WeightsError

# Below this the feature map of a family is empty before its last pooling.
_SMALLEST = {"inception_v3": 75, "inception_v4": 75, "inception_resnet_v2": 75, "xception": 64,
             "nasnet": 64, "pnasnet": 64}


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
    """A timm network.

    name: timm's (`resnet18.a1_in1k`). num_classes: of a fresh head; None keeps the pretrained one.
    Raises WeightsError when the weights cannot be had, OptionError for a size it cannot take.

    Options:
        drop_rate: dropout before the classifier, in [0, 1)
        drop_path_rate: stochastic depth, in [0, 1); networks without it refuse it
    """
    arguments: dict[str, Any] = {"in_chans": in_chans, "drop_rate": drop_rate}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if drop_path_rate:
        arguments["drop_path_rate"] = drop_path_rate
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is not None:
        _want_size(name, image_size)
        if config is not None and config.fixed_input_size:
            arguments["img_size"] = image_size
    if pretrained and (config is None or not config.has_weights):
        raise WeightsError(_no_weights(name))
    try:
        net = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise OptionError(f"timm/{name}", str(error)) from error
    except Exception as error:
        if not pretrained:
            raise
        raise WeightsError(
            f"the weights of timm/{name} cannot be had from {config.hf_hub_id or config.url} "
            f"({type(error).__name__}: {_first_line(error)}); check the network, download them "
            "while online, or pass pretrained=False for random weights") from error
    preprocessing = Preprocessing.from_timm(net.pretrained_cfg)
    net.preprocessing = preprocessing.at(image_size) if image_size else preprocessing
    net.label_names = _label_names(net)
    if pretrained:
        net.source = _source(net.pretrained_cfg)
    return net  # type: ignore[no-any-return]


def _want_size(name: str, image_size: int) -> None:
    for family, least in _SMALLEST.items():
        if name.removeprefix("tf_").startswith(family) and image_size < least:
            raise OptionError(f"timm/{name}", f"image_size is {image_size}; its pooling needs "
                              f"{least} pixels or more")


def _no_weights(name: str) -> str:
    tags = timm.list_models(f"{name.partition('.')[0]}.*", pretrained=True)
    other = f"; these have: {', '.join(tags)}" if tags else ""
    return (f"timm/{name} has no published weights{other}; pass pretrained=False for random "
            "weights")


def _label_names(net: Any) -> tuple[str, ...]:
    """ImageNet's synsets for the networks that were trained on its 1,000 classes."""
    if net.num_classes != 1000 or net.pretrained_cfg.get("num_classes") != 1000:
        return ()
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def _source(config: dict[str, Any]) -> dict[str, str]:
    """Where the weights came from: repository, commit, sha256, licence, as far as can be told."""
    source = {"repository": config.get("hf_hub_id") or config.get("url") or "",
              "license": config.get("license") or ""}
    file = _cached_file(source["repository"], config.get("hf_hub_filename"))
    if file is not None:
        source["revision"] = file.parent.name
        if len(file.resolve().name) == 64:  # the Hub's cache names large files by their sha256
            source["sha256"] = file.resolve().name
    return {key: value for key, value in source.items() if value}


def _cached_file(repository: str, filename: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if "://" in repository or not repository:
        return None
    for name in (filename, "model.safetensors"):
        found = try_to_load_from_cache(repository, name) if name else None
        if isinstance(found, str):
            return Path(found)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
