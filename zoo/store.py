"""Folder ⇄ model. A folder is a Hub repository: `model.safetensors` (or shards and an index),
`config.json` and `README.md`.

A single network of timm's is a plain timm folder; whatever is ours stands under the one key `zoo`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

import zoo
from zoo.backbones import Preprocessing
from zoo.backbones.activations import swap_activations
from zoo.backbones.folders import from_config, hub_folder, timm_config
from zoo.building import build_net, measure_features, without_weights
from zoo.card import model_card
from zoo.device import resolve_device, resolve_dtype
from zoo.discovery import discovery
from zoo.errors import BadName, FormatError, MissingPlugin, ZooError
from zoo.model import Blueprint, Fusion, Member, Model
from zoo.names import Address, Name, parse
from zoo.registry import find
from zoo.registry import load as load_builder
from zoo.specs import BackboneSpec, FusionSpec
from zoo.tensors import atomic_folder, current_folder, load_tensors, save_tensors

FORMAT = 1
UNDERSTOOD: frozenset[str] = frozenset()
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def save(
    model: Model, out: str | Path, *, max_shard_bytes: int | None = None
) -> Path:
    """Write a model as a folder, all at once: after a kill there is the old folder or the new one.

    out: replaced if it is an earlier model, refused if it holds anything else. max_shard_bytes:
        split the weights into files of at most this size (a plain timm folder is never split).
    Gives the folder. Raises FormatError when it may not be replaced.
    """
    folder = Path(out).expanduser()
    timm = timm_config(model) if model.kind == "single" else None
    described = {
        "format": FORMAT,
        "requires": _requirements(model, plain=timm is not None),
        "must_understand": [],
        "model": model.describe(),
    }
    with atomic_folder(folder, _is_model) as fresh:
        hashes = save_tensors(_state(model), fresh / WEIGHTS,
                              max_shard_bytes=None if timm else max_shard_bytes)
        described["made_with"] = {**_made_with(model), "sha256": hashes}
        config = {**(timm or {}), "zoo": described}
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (fresh / "README.md").write_text(model_card(model, described, plain=timm is not None),
                                         "utf-8")
    return folder


def load(
    path: str | Path | Address,
    *,
    device: str | torch.device | None = "auto",
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Read a model from a folder (ours or plain timm's) or an address (`hf-hub:org/name@rev`).

    Raises FormatError for what is damaged, foreign or from a newer version, MissingPlugin when
    what it needs is not installed, WeightsError when the Hub cannot give it.
    """
    where = resolve_device(device)
    folder, address = _folder(path)
    config = read_config(folder)
    described = config.get("zoo")
    if described is None:
        model = _plain_timm(folder, config)
    else:
        _check(folder, described)
        model = _build(folder, config, described)
        model.recipe = dict(described.get("made_with", {}).get("recipe", {}))
    _assign(folder, model)
    if described is None:
        measure_features(next(model.each_member()))
    if address:
        for member in model.each_member():
            member.source.setdefault("address", address)
    return model.eval().to(where, resolve_dtype(dtype) if dtype is not None else None)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises FormatError when it is none."""
    file = folder / CONFIG
    if not folder.exists():
        raise FormatError(folder, "there is no such folder")
    if not file.is_file():
        raise FormatError(folder, f"is no model: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormatError(file, f"is damaged: {error}") from None
    if not isinstance(config, dict) or not ("zoo" in config or "architecture" in config):
        raise FormatError(file, "is not a model of zoo or timm: it has neither the key 'zoo' nor "
                          "'architecture'")
    return config


def digest(state: Mapping[str, Tensor]) -> str:
    """The sha256 of a state: of every name, dtype, shape and byte, in the order of the names."""
    running = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        running.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        running.update(tensor.flatten().view(torch.uint8).numpy().data)
    return running.hexdigest()


def _folder(path: str | Path | Address) -> tuple[Path, str]:
    """Where it lies on this machine, and its address with the resolved commit if it has one."""
    reference = path if isinstance(path, Address) else _parsed(path)
    if isinstance(reference, Address) and reference.scheme == "hf-hub":
        folder, commit = hub_folder(reference.location, reference.revision)
        return folder, str(Address("hf-hub", reference.location, commit))
    if isinstance(reference, Address):
        if reference.scheme != "local-dir":
            raise BadName(str(reference), "a model's address is 'hf-hub:…' or 'local-dir:…'")
        reference = Path(reference.location).expanduser()
    return current_folder(Path(str(reference))), ""


def _parsed(path: str | Path) -> Name | Address | Path:
    """A plain string is a path here, unless it is an address."""
    if isinstance(path, str) and re.match(r"[a-z-]{3,}:", path):
        return parse(path) if isinstance(parse(path), Address) else Path(path)
    return Path(path).expanduser()


def _state(model: Model) -> dict[str, Tensor]:
    net = next(model.each_member()).net if model.kind == "single" else model
    return dict(net.state_dict())


def _is_model(folder: Path) -> bool:
    try:
        read_config(folder)
    except FormatError:
        return False
    return True


def _made_with(model: Model) -> dict[str, Any]:
    """How it was made, for people and for reproducing it."""
    recipe = model.recipe
    return {
        "strategy": recipe.get("strategy"),
        "options": recipe.get("options", {}),
        "seed": recipe.get("seed"),
        "sources": recipe.get("sources") or [
            {"name": member.name, **member.source} for member in model.each_member()],
        "norms": {member.name: member.norms for member in model.each_member()},
        "licences": sorted({str(licence) for licence in _licences(model)}),
        "versions": {name: metadata.version(name) for name in ("torch", "timm")}
        | {"fusion-zoo": zoo.__version__},
        "recipe": recipe,
    }


def _licences(model: Model) -> list[str]:
    found = [str(source["license"]) for source in model.recipe.get("sources", [])
             if source.get("license")]
    for member in model.each_member():
        if isinstance(member.net, Model):
            found += _licences(member.net)
        elif member.source.get("license"):
            found.append(member.source["license"])
    return found


def _requirements(model: Model, *, plain: bool) -> list[dict[str, str]]:
    """The distributions that a loader needs beside the core, one entry per namespace."""
    if plain:
        return []
    needed: dict[str, str] = {}
    for kind, name in _names(model):
        namespace = name.partition("/")[0]
        plugin = discovery().get(namespace)
        if plugin is None or namespace in discovery().core:
            continue
        since = find(name, kind).loads_since or plugin.version
        needed[namespace] = max(needed.get(namespace, ""), f"{plugin.distribution}>={since}")
    return [{"namespace": namespace, "requirement": requirement}
            for namespace, requirement in sorted(needed.items())]


def _names(model: Model) -> list[tuple[type[BackboneSpec] | type[FusionSpec], str]]:
    names: list[tuple[type[BackboneSpec] | type[FusionSpec], str]] = []
    if model.fusion and model.fuser is not None:
        names.append((FusionSpec, model.fusion.strategy))
    for member in model.each_member():
        if isinstance(member.net, Model):
            names += _names(member.net)
        elif member.blueprint:
            names.append((BackboneSpec, member.blueprint.backbone))
    return names


def _check(folder: Path, described: Mapping[str, Any]) -> None:
    """What a reader must know before it trusts the rest."""
    file = folder / CONFIG
    version = described.get("format")
    if not isinstance(version, int):
        raise FormatError(file, f"zoo.format is {version!r}, expected a whole number")
    if version > FORMAT:
        raise FormatError(file, f"is of format {version}, and this version reads up to {FORMAT}; "
                          "install a newer fusion-zoo")
    unknown = sorted(set(described.get("must_understand", [])) - UNDERSTOOD)
    if unknown:
        raise FormatError(file, f"needs {', '.join(unknown)}, which this version does not know; "
                          "install a newer fusion-zoo")
    for needed in described.get("requires", []):
        _want(str(needed["namespace"]), str(needed["requirement"]), str(file))


def _want(namespace: str, requirement: str, claimed_by: str) -> None:
    plugin = discovery().get(namespace)
    if plugin is None:
        raise MissingPlugin(namespace, requirement, claimed_by)
    wanted = Requirement(requirement)
    if not wanted.specifier.contains(plugin.version, prereleases=True):
        raise MissingPlugin(namespace, requirement, claimed_by,
                            found=f"{plugin.distribution} {plugin.version}")


def _build(folder: Path, config: Mapping[str, Any], described: Mapping[str, Any]) -> Model:
    """The model that a config describes, its networks without weights yet."""
    try:
        return _from_description(folder, described["model"], config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ZooError):
            raise
        raise FormatError(folder / CONFIG, f"is damaged: {type(error).__name__} in zoo.model: "
                          f"{error}") from error


def _from_description(
    folder: Path, described: Mapping[str, Any], config: Mapping[str, Any]
) -> Model:
    given = described["fusion"]
    fusion = Fusion(**given) if given else None
    plain = config if "architecture" in config else None
    members = [_member(folder, each, plain) for each in described["members"]]
    classes = tuple(described["classes"])
    fuser: nn.Module | None = None
    if fusion and fusion.kind == "features":
        dims = [member.dim for member in members]
        fuser = load_builder(find(fusion.strategy, FusionSpec))(dims, **fusion.options)
    elif fusion and fusion.kind == "outputs":
        builder = load_builder(find(fusion.strategy, FusionSpec))
        fuser = builder(len(members), len(classes), **fusion.options)
    return Model(members, classes=classes, fusion=fusion, fuser=fuser)


def _member(
    folder: Path, described: Mapping[str, Any], plain: Mapping[str, Any] | None
) -> Member:
    common = {name: described[name] for name in
              ("name", "classes", "dim", "splits", "norms", "source")}
    if "model" in described:
        return Member(_from_description(folder, described["model"], {}), **common)
    blueprint = Blueprint(**described["build"])
    net = without_weights(
        (lambda: from_config(plain, folder / CONFIG)) if plain else
        (lambda: _from_blueprint(blueprint)))
    return Member(net, blueprint=blueprint, **common,
                  preprocessing=Preprocessing(**described["preprocessing"]))


def _from_blueprint(blueprint: Blueprint) -> nn.Module:
    net = build_net(find(blueprint.backbone, BackboneSpec), num_classes=blueprint.num_classes,
                    pretrained=False, in_chans=blueprint.in_chans,
                    image_size=blueprint.image_size, options=blueprint.options)
    if blueprint.activation:
        swap_activations(net, blueprint.activation)
    return net


def _plain_timm(folder: Path, config: Mapping[str, Any]) -> Model:
    net: Any = without_weights(lambda: from_config(config, folder / CONFIG))
    told = config.get("pretrained_cfg") or config
    size = (told.get("input_size") or [3])
    classes = net.label_names if len(net.label_names) == net.num_classes else tuple(
        map(str, range(net.num_classes)))
    blueprint = Blueprint(
        backbone=f"timm/{config['architecture']}", num_classes=net.num_classes, in_chans=size[0],
        image_size=net.preprocessing.size[0])
    source = {key: told[key] for key in ("hf_hub_id", "license", "tag") if told.get(key)}
    member = Member(net, name=f"timm/{config['architecture']}", classes=classes, dim=0,
                    blueprint=blueprint, preprocessing=net.preprocessing, source=source)
    return Model([member], classes=classes)


def _assign(folder: Path, model: Model) -> None:
    """Put the stored tensors in, without a copy. Raises FormatError when they do not fit."""
    net = next(model.each_member()).net if model.kind == "single" else model
    tensors = load_tensors(folder)
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items()}
    for key in sorted(wanted.keys() ^ tensors.keys()):
        where = "is missing" if key in wanted else "belongs to no part of the model"
        raise FormatError(folder, f"does not fit its config: tensor {key!r} {where}")
    for key, shape in wanted.items():
        if tensors[key].shape != shape:
            raise FormatError(folder, f"does not fit its config: tensor {key!r} is "
                              f"{list(tensors[key].shape)}, expected {list(shape)}")
    tied = _tied(net)
    net.load_state_dict(tensors, assign=True)
    for key, first in tied.items():
        _tie(net, key, first)
    for member in model.modules():
        if isinstance(member, Member):
            member.follow()


def _tied(net: nn.Module) -> dict[str, str]:
    """Parameters that stand under several names, each with its first one."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def _tie(net: nn.Module, name: str, first: str) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(net.get_submodule(owner), attribute, net.get_parameter(first))
