"""timm's repository layout, on disk and on the Hub: `config.json` beside safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from zoo.backbones.preprocessing import Preprocessing
from zoo.errors import FormatError, WeightsError

if TYPE_CHECKING:
    from zoo.model import Model

# A config comes from anywhere, and constructor arguments become memory: these, and no others.
_MODEL_ARGS = frozenset({
    "img_size", "in_chans", "global_pool", "class_token", "reg_tokens", "no_embed_class",
    "init_values", "drop_rate", "drop_path_rate", "act_layer", "window_size", "pos_embed",
})
# What a timm pretrained_cfg says of where its own weights lie: not true of ours.
_THEIRS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load",
           "test_input_size", "test_crop_pct", "notes")
_LARGEST_SIDE = 4096


def from_config(config: Mapping[str, Any], file: Path) -> nn.Module:
    """The network that a timm config describes, without weights.

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
    told = config.get("pretrained_cfg") or config
    _want_sane_sizes(file, arguments.get("img_size"), told.get("input_size"))
    num_classes = config.get("num_classes", told.get("num_classes"))
    net = timm.create_model(architecture, pretrained=False, num_classes=num_classes,
                            pretrained_cfg=None, **arguments)
    net.preprocessing = Preprocessing.from_timm(told)
    net.label_names = tuple(config.get("label_names") or ())
    return net  # type: ignore[no-any-return]


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
    side = member.preprocessing.size[0]
    arguments: dict[str, Any] = {}
    if told.get("fixed_input_size"):
        arguments["img_size"] = side
    if blueprint.in_chans != 3:
        arguments["in_chans"] = blueprint.in_chans
    kept = {key: value for key, value in told.items() if key not in _THEIRS and _is_json(value)}
    statistics = member.preprocessing.for_channels(blueprint.in_chans)
    return {
        "architecture": told["architecture"],
        "num_classes": len(model.classes),
        "num_features": int(getattr(net, "num_features", member.dim)),
        **({"global_pool": net.global_pool} if isinstance(
            getattr(net, "global_pool", None), str) else {}),
        "label_names": list(model.classes),
        "model_args": arguments,
        "pretrained_cfg": {
            **kept, "input_size": [blueprint.in_chans, side, side], "crop_pct": 1.0,
            "mean": list(statistics.mean), "std": list(statistics.std),
            "interpolation": statistics.interpolation, "num_classes": len(model.classes),
        },
    }


def hub_folder(repository: str, revision: str | None) -> tuple[Path, str]:
    """A Hub repository on this machine, and the commit it is at; pickles are not fetched.

    Raises WeightsError when it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(
            repository, revision=revision,
            allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"hf-hub:{repository}{f'@{revision}' if revision else ''} cannot be had "
                           f"({type(error).__name__}: {reason}); check the name and the network, "
                           "or download it while online") from error
    return folder, folder.name


def _want_sane_sizes(file: Path, *sizes: Any) -> None:
    for size in sizes:
        for side in size if isinstance(size, (list, tuple)) else [size or 1]:
            if not isinstance(side, int) or not 0 < side <= _LARGEST_SIDE:
                raise FormatError(file, f"asks for images of {size}, expected whole numbers up to "
                                  f"{_LARGEST_SIDE}")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
