"""From a saved config to a model as it was built, its tensors still without values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zoo.backbones import Preprocessing
from zoo.backbones.activations import swap_activations
from zoo.backbones.layers import POOLS, want_layers
from zoo.blueprints import Blueprint, Fusion
from zoo.building import build_fuser, build_net, without_weights
from zoo.errors import FormatError, OptionError, UnknownName, ZooError
from zoo.member import Member
from zoo.model import Inner, Model
from zoo.names import Address
from zoo.options import checked
from zoo.registry import find
from zoo.specs import TAKES, BackboneSpec, FusionSpec
from zoo.store.links import Link, fetch_links
from zoo.store.timm_layout import from_config, kept_config, want_sane

# Below these sizes no network computes tables that matter; above them, so many bytes are free.
_USUAL = {"img_size": 512, "image_size": 512, "input_size": 512, "size": 512, "window_size": 16}
_FREE_BYTES = 64_000_000


def rebuild(file: Path, config: Mapping[str, Any], elsewhere: int = 0) -> Model:
    """The model that a `config.json` describes, ours or plain timm's. Of a plain timm network the
    features are still to be measured.

    elsewhere: bytes of weights that lie in other folders.

    Raises FormatError for what is damaged, and what PluginError a plugin of its raises.
    """
    try:
        # Plain timm's files that were merged have our key and no model of ours in it.
        if "zoo" not in config or ("architecture" in config and "model" not in config["zoo"]):
            return _plain_timm(file, config)
        plain = config if "architecture" in config else None
        return _model(file, config["zoo"]["model"], plain, elsewhere)
    except (OptionError, UnknownName) as error:
        raise FormatError(file, f"describes what cannot be built here: {error}") from error
    except ZooError:
        raise
    except Exception as error:  # whatever a constructor makes of values from a file
        raise FormatError(file, f"is damaged: its model cannot be built ({type(error).__name__}: "
                          f"{error})") from error


def rebuild_linked(
    file: Path, config: Mapping[str, Any], links: Mapping[str, Link], place: object
) -> tuple[Model, dict[Address, list[Path]]]:
    """As `rebuild`, and the files of the linked members, which are fetched only when there is a
    model that they may belong to.

    place: the model, for errors. Raises WeightsError as `fetch_links` does.
    """
    try:
        model, whole = rebuild(file, config), True
    except FormatError:
        if not links:
            raise
        # Its tables may be large beside the weights that are here, and not beside all: it is built
        # without memory until the others are at hand.
        with torch.device("meta"):
            model, whole = rebuild(file, config, sys.maxsize), False
    if not links:
        return model, {}
    fetched = fetch_links(place, links, model.state_dict())
    if not whole:
        model = rebuild(file, config, sum(
            each.stat().st_size for files in fetched.values() for each in files))
    return model, fetched


def _model(
    file: Path, described: Mapping[str, Any], plain: Mapping[str, Any] | None, elsewhere: int
) -> Model:
    given = described["fusion"]
    fusion = Fusion(**given) if given else None
    members = [_member(file, each, plain, elsewhere) for each in described["members"]]
    classes = _class_names(file, described["classes"])

    def joined() -> Model:
        fuser: nn.Module | None = None
        if fusion and fusion.kind != "weights":
            spec = find(fusion.strategy, FusionSpec)
            fuser = build_fuser(spec, members, classes, checked(spec, fusion.options))
        return Model(members, classes=classes, fusion=fusion, fuser=fuser)

    return cast(Model, without_weights(joined))


def _member(
    file: Path, described: Mapping[str, Any], plain: Mapping[str, Any] | None, elsewhere: int
) -> Member:
    common = {name: described[name] for name in ("name", "dim", "splits", "norms", "source")}
    common["classes"] = _class_names(file, described["classes"])
    common["gives"] = described.get("gives", "vectors")
    if common["gives"] not in TAKES:
        raise FormatError(file, f"is damaged: {common['name']} gives {common['gives']!r}, expected "
                          f"{' or '.join(TAKES)}")
    common["layers"], common["pool"] = described.get("layers", ()), described.get("pool")
    if common["pool"] not in (None, *POOLS):
        raise FormatError(file, f"is damaged: {common['name']} pools by {common['pool']!r}, "
                          f"expected {' or '.join(POOLS)}")
    if "model" in described:
        return Inner(_model(file, described["model"], None, elsewhere), **common)
    blueprint = Blueprint(**described["build"])
    preprocessing = Preprocessing(**described["preprocessing"])
    want_sane(file, {"img_size": preprocessing.size, **described["build"]})
    if blueprint.num_classes != len(common["classes"]):
        raise FormatError(file, f"is damaged: {common['name']} has {blueprint.num_classes} outputs "
                          f"and {len(common['classes'])} class names")
    net = _built(file, (lambda: from_config(plain, file)) if plain else
                 (lambda: _network(file, blueprint)), [described, plain], elsewhere)
    want_layers(net, common["name"], common["layers"])
    return Member(net, blueprint=blueprint, preprocessing=preprocessing, **common)


def _built(
    file: Path, build: Callable[[], nn.Module], told: Any, elsewhere: int = 0
) -> nn.Module:
    """The network, without weights. What it computes from a size that the file sets, tables of
    positions and masks, is real memory: it is counted first, and the weights must be worth it.

    told: the parts of the config that set sizes. Raises FormatError.
    """
    if _is_large(told):
        try:
            with torch.device("meta"):
                net = build()
        except (NotImplementedError, RuntimeError) as error:
            raise FormatError(file, "asks for a size whose memory cannot be told beforehand for "
                              f"this architecture ({type(error).__name__})") from None
        needed = sum(buffer.nbytes for buffer in net.buffers())
        stored = elsewhere + sum(each.stat().st_size for each in file.parent.glob("*.safetensors"))
        if needed > _FREE_BYTES + 8 * stored:
            raise FormatError(file, f"asks for a size whose tables take {needed:,} bytes, and its "
                              f"weights have {stored:,}; that is no network that anybody trained")
    return without_weights(build)


def _is_large(told: Any, name: str = "") -> bool:
    """Whether a config sets a size that is larger than most networks are."""
    if isinstance(told, Mapping):
        return any(_is_large(value, str(key)) for key, value in told.items())
    if isinstance(told, (list, tuple)):
        return any(_is_large(value, name) for value in told)
    return isinstance(told, int) and told > _USUAL.get(name, told)


def _network(file: Path, blueprint: Blueprint) -> nn.Module:
    if blueprint.config:
        net = from_config({**blueprint.config, "num_classes": blueprint.num_classes}, file)
    else:
        spec = find(blueprint.backbone, BackboneSpec)
        net = build_net(spec, num_classes=blueprint.num_classes, pretrained=False,
                        in_chans=blueprint.in_chans, image_size=blueprint.image_size,
                        options=checked(spec, blueprint.options))
    if blueprint.activation:
        swap_activations(net, blueprint.activation)
    return net


def _plain_timm(file: Path, config: Mapping[str, Any]) -> Model:
    net: Any = _built(file, lambda: from_config(config, file), config)
    counted = tuple(map(str, range(net.num_classes)))
    classes = net.label_names if len(net.label_names) == net.num_classes else counted
    name = f"timm/{config['architecture']}"
    kept = kept_config(config)
    blueprint = Blueprint(backbone=name, num_classes=net.num_classes, config=kept,
                          in_chans=kept["pretrained_cfg"]["input_size"][0])
    told = config.get("pretrained_cfg") or config
    source = {"architecture": name, **{key: told[key] for key in ("license", "tag")
                                       if told.get(key)}}
    member = Member(net, name=name, classes=_class_names(file, list(classes)), dim=0,
                    blueprint=blueprint, preprocessing=net.preprocessing, source=source)
    return Model([member], classes=member.classes)


def _class_names(file: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise FormatError(file, "is damaged: its classes are not a list of names")
    twice = next((name for name in given if given.count(name) > 1), None) \
        if len(set(given)) < len(given) else None
    if twice is not None:
        raise FormatError(file, f"is damaged: the class {twice!r} stands twice")
    return tuple(given)
