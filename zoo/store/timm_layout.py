"""timm's layout of a model: `config.json` beside safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zoo.backbones.preprocessing import Preprocessing
from zoo.errors import FormatError

if TYPE_CHECKING:
    from zoo.model import Model

# A config comes from anywhere, and constructor arguments become memory: these, and no others.
_MODEL_ARGS = frozenset({
    "num_classes", "img_size", "in_chans", "global_pool", "class_token", "reg_tokens",
    "no_embed_class", "init_values", "drop_rate", "drop_path_rate", "act_layer", "window_size",
    "pos_embed", "dynamic_img_size", "strict_img_size",
})
# The most that each of these numbers may be.
_LIMITS = {"input_size": 4096, "img_size": 4096, "in_chans": 4096, "window_size": 64,
           "reg_tokens": 4096, "num_classes": 200_000}
# What a timm pretrained_cfg says of where its own weights lie and of a test at another size.
_THEIRS = frozenset({
    "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load",
    "min_input_size", "test_input_size", "test_crop_pct", "test_pool_size", "notes",
    "label_names", "label_descriptions", "label_offset",
})


def from_config(config: Mapping[str, Any], file: Path) -> nn.Module:
    """The network that a timm config describes, without weights, with its `preprocessing` and its
    `label_names`.

    Raises FormatError naming the file for an unknown architecture, or an argument that a config
    may not set.
    """
    import timm

    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise FormatError(file, f"timm has no architecture {architecture!r}; a newer timm may")
    arguments = dict(config.get("model_args") or {})
    refused = sorted(set(arguments) - _MODEL_ARGS)
    if refused:
        raise FormatError(file, f"sets {', '.join(refused)} of the constructor; of model_args only "
                          f"{', '.join(sorted(_MODEL_ARGS))} are taken from a file")
    if "num_classes" in config:
        arguments["num_classes"] = config["num_classes"]
    told = dict(config.get("pretrained_cfg") or config)
    want_sane(file, {**told, **arguments})
    kept = kept_config(config)["pretrained_cfg"]
    net = timm.create_model(architecture, pretrained=False, **arguments, pretrained_cfg=kept)
    net.preprocessing = Preprocessing.from_timm(kept).for_channels(kept["input_size"][0])
    net.label_names = _label_names(config.get("label_names") or told.get("label_names"))
    return net  # type: ignore[no-any-return]


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a timm config, what says how to build and prepare, whatever the number of classes."""
    from timm.models import PretrainedCfg

    told = config.get("pretrained_cfg") or config
    known = {field.name for field in fields(PretrainedCfg)} - _THEIRS
    arguments = config.get("model_args") or {}
    channels, *size = told.get("input_size") or (3, 224, 224)
    if arguments.get("img_size"):
        given = arguments["img_size"]
        size = [given, given] if isinstance(given, int) else list(given)
    return {
        "architecture": config["architecture"],
        "model_args": {key: arguments[key] for key in arguments if key != "num_classes"},
        "pretrained_cfg": {**{key: told[key] for key in told if key in known},
                           "input_size": [arguments.get("in_chans") or channels, *size]},
    }


def want_sane(file: Path, numbers: Mapping[str, Any]) -> None:
    """Raises FormatError naming the file when one of the sizes and counts that it sets is none."""
    for name, most in _LIMITS.items():
        given = numbers.get(name)
        for number in given if isinstance(given, (list, tuple)) else [given]:
            if number is not None and not (type(number) is int and 0 <= number <= most):
                raise FormatError(file, f"{name} is {given!r}, expected whole numbers up to "
                                  f"{most:,}")


def timm_config(model: Model) -> dict[str, Any] | None:
    """The top of `config.json` that makes a saved single network a plain timm model, or None for
    a network that plain timm would build differently."""
    member = next(model.each_member())
    net: Any = member.net
    blueprint = member.blueprint
    told = getattr(net, "pretrained_cfg", None)
    if blueprint is None or blueprint.activation or not isinstance(told, dict):
        return None
    if blueprint.in_chans not in (1, 3) or not told.get("architecture"):
        return None  # plain timm cannot adapt weights of other numbers of channels
    assert member.preprocessing is not None
    preprocessing = member.preprocessing.for_channels(blueprint.in_chans)
    arguments = dict((blueprint.config or {}).get("model_args") or {})
    if told.get("fixed_input_size"):
        arguments["img_size"] = list(preprocessing.size)
    if blueprint.in_chans != 3:
        arguments["in_chans"] = blueprint.in_chans
    kept = {key: value for key, value in told.items() if key not in _THEIRS and _is_json(value)}
    pool = getattr(net, "global_pool", None)
    return {
        "architecture": told["architecture"],
        "num_classes": len(model.classes),
        "num_features": int(getattr(net, "num_features", member.dim)),
        **({"global_pool": pool} if isinstance(pool, str) else {}),
        "label_names": list(model.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            **kept, "input_size": [blueprint.in_chans, *preprocessing.size], "crop_pct": 1.0,
            "mean": list(preprocessing.mean), "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation, "num_classes": len(model.classes),
        },
    }


def _label_names(given: Any) -> tuple[str, ...]:
    """timm writes them as a list, or as a mapping from index to name."""
    if isinstance(given, Mapping):
        given = [given[index] for index in sorted(given, key=int)]
    return tuple(map(str, given or ()))


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
