"""Build timm's networks, with their published weights or without, and nothing in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg
from torch import nn

from zoo.backbones.preprocessing import Preprocessing
from zoo.backbones.timm_catalog import spdx
from zoo.downloads import forget_store, guard_client
from zoo.errors import OptionError, WeightsError
from zoo.tensors import sha256_file


def build(
    *,
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
) -> nn.Module:
    """A timm network, with its `preprocessing`, its `label_names` and the `source` of its weights.

    name: timm's (`resnet18.a1_in1k`). num_classes: of a fresh head; None keeps the pretrained one.
    in_chans: other than 3, the first layer's weights are repeated or summed, as timm does.
    image_size: side of the square it looks at, by default the tag's own.
    Raises WeightsError when the weights cannot be had, or not for these channels or this size;
    OptionError for a size or an option that the network cannot take.

    Options:
        drop_rate: dropout before the classifier, in [0, 1); null is the architecture's own
        drop_path_rate: stochastic depth, in [0, 1); null is the architecture's own
    """
    _want_numbers(name, image_size, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True) or PretrainedCfg()
    overlay, source = _fetch(name, config) if pretrained else ({}, {})
    net = _create(
        name, pretrained, image_size, source,
        # With the pretrained head timm loads strictly; with another it would leave whatever the
        # file lacks at random.
        num_classes=None if pretrained else num_classes,
        in_chans=in_chans,
        img_size=image_size if config.fixed_input_size else None,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        pretrained_cfg_overlay=overlay,
    )
    if not hasattr(net, "reset_classifier"):
        raise OptionError(f"timm/{name}", "it is an encoder that cannot classify; choose another")
    if pretrained:
        _want_adapted_stem(name, net, in_chans)
    if num_classes not in (None, net.num_classes):
        net.reset_classifier(num_classes)
    net.pretrained_cfg.pop("file", None)  # a path on this machine is nobody else's business
    native = Preprocessing.from_timm(net.pretrained_cfg).for_channels(in_chans)
    if image_size is not None and native.size != (image_size, image_size):
        _want_size(name, net, in_chans, image_size, min(native.size))
    net.preprocessing = native if image_size is None else native.at(image_size)
    net.label_names = _label_names(net)
    net.source = source
    return net  # type: ignore[no-any-return]


def _want_numbers(name: str, image_size: int | None, **rates: float | None) -> None:
    if image_size is not None and image_size < 1:
        raise OptionError(f"timm/{name}", f"image_size is {image_size}, expected pixels")
    for option, rate in rates.items():
        if rate is not None and not 0 <= rate < 1:
            raise OptionError(f"timm/{name}", f"{option} is {rate}, expected a share in [0, 1)")


def _fetch(name: str, config: PretrainedCfg) -> tuple[dict[str, Any], dict[str, str]]:
    """What timm needs to know to load the weights from here, and where they come from."""
    if not config.has_weights:
        raise WeightsError(_no_weights(name))
    licence = {"license": spdx(config.license)} if config.license else {}
    if not config.hf_hub_id:
        return {}, {"url": str(config.url), **licence}  # timm downloads it, weights_only=True
    from huggingface_hub import snapshot_download

    repository = config.hf_hub_id
    filename = config.hf_hub_filename or "model.safetensors"
    guard_client()
    try:
        # Without a network this fails at once; timm's own download tries for 45 seconds.
        folder = snapshot_download(repository, allow_patterns=[filename])
    except Exception as error:
        forget_store()
        raise _unreachable(name, repository, _reason(error)) from error
    file = Path(folder, filename)
    if not file.is_file():
        raise _unreachable(name, repository, f"there is no {filename}, and pickles are not loaded "
                           "(`zoo convert` makes safetensors of one)")
    return {"file": str(file), "custom_load": False}, {
        "repository": repository, "revision": file.parent.name, "sha256": sha256_file(file),
        **licence,
    }


def _create(
    name: str, pretrained: bool, image_size: int | None, source: Mapping[str, str], **arguments: Any
) -> Any:
    """timm.create_model, which leaves out arguments that are None, with errors that say why."""
    owner = f"timm/{name}"
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        for option in ("drop_path_rate", "drop_rate"):
            if arguments[option] is not None and f"'{option}'" in str(error):
                raise OptionError(owner, f"this architecture has no {option}") from error
        raise
    except (OSError, SafetensorError) as error:
        where = source.get("repository") or source.get("url", "")
        raise _unreachable(name, where, _reason(error)) from error
    except (RuntimeError, AssertionError, ValueError, ZeroDivisionError) as error:
        if pretrained and isinstance(error, RuntimeError):
            raise WeightsError(
                f"the weights of {owner} do not fit the network you ask for (in_chans="
                f"{arguments['in_chans']}, image_size={image_size}): {_reason(error)}; ask for "
                "its own channels and size, or pass pretrained=False") from error
        if image_size is not None:
            raise OptionError(owner, f"image_size is {image_size}, which it cannot take: "
                              f"{_reason(error)}") from error
        raise


def _want_adapted_stem(name: str, net: Any, in_chans: int) -> None:
    """timm leaves a first layer that it cannot adapt at random and says so in its log only."""
    stems = net.pretrained_cfg["first_conv"]
    for stem in [stems] if isinstance(stems, str) else stems or ():
        weight = net.get_submodule(stem).weight
        adapted = weight.ndim == 4 and (in_chans == 1 or weight.shape[1] == in_chans)
        if in_chans != 3 and not adapted:
            raise WeightsError(f"the weights of timm/{name} are for 3 channels and {stem!r} cannot "
                               f"be adapted to {in_chans}; pass in_chans=3 or pretrained=False")


def _want_size(name: str, net: nn.Module, in_chans: int, asked: int, native: int) -> None:
    """Try one blank image; when it fails, look for the smallest size that works."""
    if next(net.parameters()).is_meta:
        return  # built without weights, which a file will bring: it cannot run yet
    problem = _failure(net, in_chans, asked)
    if not problem:
        return
    fails, works = asked, native
    while works - fails > 1:
        middle = (fails + works) // 2
        if _failure(net, in_chans, middle):
            fails = middle
        else:
            works = middle
    raise OptionError(f"timm/{name}", f"image_size is {asked}, which it cannot take ({problem}); "
                      f"give it {works} pixels{' or more' if works < native else ''}")


@torch.no_grad()
def _failure(net: nn.Module, in_chans: int, side: int) -> str:
    """What goes wrong with a blank square image; "" when nothing does."""
    training = net.training
    try:
        net.eval()(torch.zeros(1, in_chans, side, side))
    except (RuntimeError, AssertionError, ValueError, IndexError, ZeroDivisionError) as error:
        return _reason(error)
    finally:
        net.train(training)
    return ""


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


def _unreachable(name: str, where: str, reason: str) -> WeightsError:
    return WeightsError(
        f"the weights of timm/{name} cannot be had from {where} ({reason}); check the network, "
        "fetch them once while online (they are cached), or pass pretrained=False for random "
        "weights")


def _reason(error: Exception) -> str:
    """The first line of what it says, and the second where the first announces a list."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
