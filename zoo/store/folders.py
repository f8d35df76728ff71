"""Folder ⇄ model. A folder is a Hub repository: `model.safetensors` (or shards and an index),
`config.json` and `README.md`.

A single network of timm's is a plain timm folder; whatever is ours stands under the one key `zoo`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import zoo
from zoo.atomic import atomic_file, atomic_folder, current_folder
from zoo.building import measure_features, without_weights
from zoo.device import resolve_device, resolve_dtype
from zoo.discovery import discovery
from zoo.errors import BadName, FormatError, ZooError
from zoo.member import Member
from zoo.model import Inner, Model
from zoo.names import MODEL_SCHEMES, Address, is_path, parse
from zoo.registry import find
from zoo.report.captions import CAPTIONS
from zoo.report.curves import curve_of
from zoo.report.pictures import draw
from zoo.requirements import missing, requirement_of, requirements
from zoo.specs import BackboneSpec, FusionSpec
from zoo.store.card import model_card
from zoo.store.contents import CARD, CONFIG, WEIGHTS, is_ignored, is_published
from zoo.store.fetching import hub_folder, origin_of
from zoo.store.links import linked_tensors, links_of, read_links
from zoo.store.measured import Measured
from zoo.store.private import public
from zoo.store.rebuilding import rebuild_linked
from zoo.store.timm_layout import from_config, timm_config
from zoo.tensors import ALIGNMENT, load_tensors, open_tensors, save_tensors
from zoo.tensors.reading import PICKLES, pickled

if TYPE_CHECKING:
    from zoo.evaluation import Evaluation

FORMAT = 1
# "gives": a member gives its fusion tokens or maps, where it would otherwise give pooled features.
# "layers": it gives those of chosen layers, or pooled in a chosen way.
# "links": the weights of members lie in other repositories.
UNDERSTOOD: frozenset[str] = frozenset({"gives", "layers", "links"})
# What `made_with` says of the saving; the rest is the model's recipe.
_SAVING = ("norms", "licences", "versions", "sha256")
_FEW = 64  # members that are built without looking at the weights first
# torch's own allocations begin at multiples of 64 bytes, and kernels round differently elsewhere.


def save(
    model: Model, out: str | os.PathLike[str], *, max_shard_bytes: int | None = None,
    evaluations: Mapping[str, Evaluation] | None = None, link_members: bool = False,
) -> Path:
    """Write a model as a folder, all at once: after a kill there is the old folder or the new one.

    out: replaced if it is an earlier model and nothing else, refused if it holds anything else.
    max_shard_bytes: split the weights into files of at most this size (a plain timm folder is
        never split).
    evaluations: what `zoo.evaluate` said of this model, under "fused" or "model", and of others on
        the same images, under any name: a table and pictures of the model card.
    link_members: of members of a fusion of features or outputs that came from the Hub and have the
        very same weights, write where these are, at which commit and with which sha256, and no
        copy; warns of those that are carried all the same, and why. `load` fetches them.
    Gives the folder. Raises FormatError when it may not be replaced, OptionError for evaluations
    that are not this model's or not of the same images.
    """
    if not isinstance(model, Model):
        raise ZooError(f"save writes a zoo.Model, and a {type(model).__name__} is not one; "
                       "zoo.backbone builds one, zoo.fuse too")
    folder = Path(out).expanduser()
    measured = Measured.of(model, evaluations or {})
    timm = _plain_config(model)
    links = links_of(model) if link_members else {}
    described = {
        "format": FORMAT,
        "requires": [] if timm else _requirements(model),
        "must_understand": [
            *(["gives"] if model.unpooled else []), *(["layers"] if _chooses(model) else []),
            *(["links"] if links else [])],
        "model": model.describe(),
        **({"links": {path: link.as_dict() for path, link in links.items()}} if links else {}),
    }
    carried = {key: tensor for key, tensor in network(model).state_dict().items()
               if not any(key.startswith(f"{path}.") for path in links)}
    with atomic_folder(folder, is_only_a_model) as fresh:
        hashes = save_tensors(carried, fresh / WEIGHTS,
                              max_shard_bytes=None if timm else max_shard_bytes)
        described["made_with"] = {**_made_with(model), "sha256": hashes}
        config = {**(timm or {}), "zoo": described}
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        (fresh / CONFIG).write_text(text, "utf-8")
        for name, data in _pages(model, described, measured, plain=timm is not None).items():
            (fresh / name).write_bytes(data)
    return folder


def write_card(folder: Path, model: Model, evaluations: Mapping[str, Evaluation]) -> None:
    """Write the card of a saved model anew, with its pictures; the rest of the folder stays.

    model: as it was loaded from there. evaluations: as of `save`, which see for what it raises;
    FormatError where plain timm saved it and its making is not known.
    """
    measured = Measured.of(model, evaluations)
    config = read_config(folder)
    if "model" not in config.get("zoo", {}):
        raise FormatError(folder / CONFIG, "does not say what the model was made with, and its "
                          "card is its author's; zoo.save writes a folder with a card of ours")
    pages = _pages(model, config["zoo"], measured, plain="architecture" in config)
    for name in CAPTIONS.keys() - pages.keys():
        (folder / name).unlink(missing_ok=True)
    for name, data in pages.items():
        with atomic_file(folder / name) as file:
            file.write(data)


def card_of(folder: Path, model: Model) -> str | None:
    """The card that `save` writes of a model without figures; None where its making is not known.

    model: as it was loaded from there.
    """
    config = read_config(folder)
    ours = config.get("zoo", {})
    if "model" not in ours or "sources" not in ours.get("made_with", {}):
        return None
    pages = _pages(model, ours, Measured.of(model, {}), plain="architecture" in config)
    return pages[CARD].decode()


def load(
    path: str | os.PathLike[str] | Address,
    *,
    device: str | torch.device | None = "auto",
    dtype: str | torch.dtype | None = None,
) -> Model:
    """Read a model from a folder (ours or plain timm's) or an address (`hf-hub:org/name@rev`).

    Raises FormatError for what is damaged, foreign or from a newer version, MissingPlugin when
    what it needs is not installed, WeightsError when the Hub cannot give it.
    """
    where = resolve_device(device)
    model = load_fetched(*_folder(path))
    return model.to(where, resolve_dtype(dtype) if dtype is not None else None)


def load_fetched(folder: Path, origin: Mapping[str, str]) -> Model:
    """Read a model, to the CPU, from a folder that is at hand.

    origin: which repository and commit it is; {} where it is none. Raises as `load` does.
    """
    config = read_config(folder)
    described = config.get("zoo")
    if described is not None:
        want_loadable(folder / CONFIG, described)
    links = read_links(folder / CONFIG, described)
    if described is not None:
        _want_few_members(folder, described, len(links))
    with torch.random.fork_rng(devices=[]):
        model, linked = rebuild_linked(
            folder / CONFIG, config, links, origin.get("repository", folder))
    _assign(folder, model, linked_tensors(links, linked, network(model).state_dict()))
    if described is None or "model" not in described:
        measure_features(next(model.each_member()))
    if described is not None:
        model.recipe = _recipe(described.get("made_with", {}))
    for number, member in enumerate(model.each_member()):
        link = links.get(f"members.{number}.net")
        if link is not None:
            member.source |= link.origin
        elif origin and not any(path.startswith(f"members.{number}.") for path in links):
            kept = {key: value for key, value in member.source.items() if key != "sha256"}
            member.source = {**kept, **origin}
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder. Raises FormatError when it is none."""
    file = folder / CONFIG
    if not folder.exists():
        raise FormatError(folder, "there is no such folder; a registered network is built by "
                          "zoo.backbone, a Hub repository is 'hf-hub:org/name'")
    if folder.suffix in PICKLES and folder.is_file():
        raise pickled(folder)
    if not file.is_file():
        raise FormatError(folder, f"is no model: it has no {CONFIG}")
    try:
        config = json.loads(file.read_text("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise FormatError(file, f"is damaged: {error}") from None
    if not isinstance(config, dict) or not ("zoo" in config or "architecture" in config):
        raise FormatError(file, "is not a model of zoo or timm: it has neither the key 'zoo' nor "
                          "'architecture'")
    return config


def network(model: Model) -> nn.Module:
    """The one network of a single model; the model itself when it has several."""
    return next(model.each_member()).net if model.kind == "single" else model


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _folder(path: str | os.PathLike[str] | Address) -> tuple[Path, dict[str, str]]:
    """Where it lies on this machine; from the Hub, also which repository and commit it is."""
    reference: object = path
    # A plain string is a path here, unless it is an address.
    if isinstance(path, str) and not is_path(path) and re.match(r"[a-z][a-z0-9-]+:", path):
        reference = parse(path)
    if isinstance(reference, Address):
        if reference.scheme not in MODEL_SCHEMES:
            raise BadName(str(reference), "a model's address is 'hf-hub:…' or 'local-dir:…'")
        if reference.scheme == "hf-hub":
            return hub_folder(reference)
    given = reference.location if isinstance(reference, Address) else str(path)
    folder = current_folder(Path(given).expanduser())
    return folder, origin_of(folder)


def is_only_a_model(folder: Path) -> bool:
    """Whether nothing is lost when the folder is replaced but a model."""
    if not all((is_published(file.name) or is_ignored(file.name)) and file.is_file()
               for file in folder.iterdir()):
        return False
    try:
        read_config(folder)
    except FormatError:
        return False
    return True


def _plain_config(model: Model) -> dict[str, Any] | None:
    """What makes the folder a plain timm model, if timm alone builds exactly this network."""
    config = timm_config(model) if model.kind == "single" else None
    member = next(model.each_member())
    if config is None or member.blueprint is None:
        return None
    if not member.blueprint.backbone.startswith("timm/"):  # a plugin may have changed timm's
        twin = without_weights(lambda: from_config(config, Path(CONFIG)))
        if str(twin) != str(member.net):
            return None
    return config


def _pages(
    model: Model, described: Mapping[str, Any], measured: Measured, *, plain: bool
) -> dict[str, bytes]:
    """The pictures and, last, the card that shows them, by file name."""
    pictures = draw(public(model.classes), measured.by_name, measured.own, curve_of(model.recipe))
    card = model_card(model, described, measured, list(pictures), plain=plain)
    return {**pictures, CARD: card.encode()}


def _made_with(model: Model) -> dict[str, Any]:
    """How it was made, for people and for reproducing it."""
    made = {
        "strategy": None, "options": {}, "seed": None,
        "sources": [{"name": member.name, **member.source} for member in model.each_member()],
        **model.recipe,
    }
    return {
        **made,
        "norms": [{"member": member.name, "norms": member.norms}
                  for member in model.each_member()],
        "licences": sorted(set(_licences(
            [made["sources"], made.get("base"), made.get("transfers")]))),
        "versions": {name: metadata.version(name) for name in ("torch", "timm")}
        | {"fusion-zoo": zoo.__version__},
    }


def _recipe(made: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of the model that was saved with this `made_with`."""
    left = {key: value for key, value in made.items() if key not in _SAVING}
    if not left.get("strategy"):  # a network by itself comes from where its member comes from
        for key in ("strategy", "options", "sources"):
            left.pop(key, None)
    return {key: value for key, value in left.items() if value is not None}


def _licences(told: object) -> Iterator[str]:
    """Every licence that stands anywhere in where a model comes from."""
    if isinstance(told, dict):
        if told.get("license"):
            yield str(told["license"]).lower()
        told = list(told.values())
    if isinstance(told, list):
        for each in told:
            yield from _licences(each)


def _requirements(model: Model) -> list[dict[str, str]]:
    """The distributions that a loader needs beside the core, one entry per namespace."""
    since: dict[str, set[str]] = {}
    for kind, name in _names(model):
        namespace = name.partition("/")[0]
        if namespace not in discovery().core and discovery().get(namespace):
            since.setdefault(namespace, set()).add(find(name, kind).loads_since)
    return [{"namespace": namespace,
             "requirement": requirement_of(discovery().found[namespace], versions)}
            for namespace, versions in sorted(since.items())]


def _names(model: Model) -> Iterator[tuple[type[BackboneSpec] | type[FusionSpec], str]]:
    if model.fusion and model.fuser is not None:
        yield FusionSpec, model.fusion.strategy
    for member in model.each_member():
        if isinstance(member, Inner):
            yield from _names(member.net)
        elif member.blueprint:
            yield BackboneSpec, member.blueprint.backbone


def want_loadable(file: Path, described: Any) -> None:
    """Whether this installation can load what the key `zoo` describes. Raises FormatError,
    MissingPlugin."""
    form = described.get("format") if isinstance(described, dict) else None
    if type(form) is not int or form < 1:
        raise FormatError(file, "is damaged: zoo.format is no version of the format")
    if form > FORMAT:
        raise FormatError(file, f"has format {form}, this version reads up to {FORMAT}; "
                          "install a newer fusion-zoo")
    unknown = sorted({str(name) for name in described.get("must_understand") or ()} - UNDERSTOOD)
    if unknown:
        raise FormatError(file, f"needs {', '.join(unknown)}, which this version does not know; "
                          "install a newer fusion-zoo")
    for namespace, wanted in requirements(file, described):
        lacking = missing(namespace, wanted, str(file))
        if lacking:
            raise lacking


def _want_few_members(folder: Path, described: Mapping[str, Any], linked: int) -> None:
    """Each member is built, and each has a tensor at least, or is linked. Raises FormatError."""
    model = described.get("model")
    members = model.get("members") if isinstance(model, dict) else None
    if isinstance(members, list) and len(members) > _FEW and len(members) > linked + len(
            open_tensors(folder)):
        raise FormatError(folder, f"does not fit its config: it names {len(members):,} members, "
                          "and has fewer tensors")


def _assign(folder: Path, model: Model, linked: Mapping[str, Tensor]) -> None:
    """Put the stored tensors in, without a copy. Raises FormatError when they do not fit."""
    net = network(model)
    stored = load_tensors(folder)
    wanted = net.state_dict()
    for key in sorted(stored.keys() & linked.keys()):
        raise FormatError(folder, f"has tensor {key!r}, and links its member elsewhere")
    stored |= linked
    for key in sorted(wanted.keys() ^ stored.keys()):
        where = "is missing" if key in wanted else "belongs to no part of the model"
        raise FormatError(folder, f"does not fit its config: tensor {key!r} {where}")
    for key, like in wanted.items():
        if stored[key].shape != like.shape:
            raise FormatError(folder, f"does not fit its config: tensor {key!r} is "
                              f"{list(stored[key].shape)}, expected {list(like.shape)}")
        if stored[key].is_floating_point() != like.is_floating_point():
            raise FormatError(folder, f"does not fit its config: tensor {key!r} is "
                              f"{stored[key].dtype}, expected {like.dtype}")
    net.load_state_dict({key: _aligned(tensor) for key, tensor in stored.items()}, assign=True)
    _tie(net, stored)
    for module in model.modules():
        if isinstance(module, Member) and not isinstance(module, Inner):
            module.follow()


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _tie(net: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """One parameter for all names under which a tensor was stored once."""
    first: dict[int, str] = {}
    for name, _ in list(net.named_parameters(remove_duplicate=False)):
        kept = first.setdefault(id(stored[name]), name)
        if kept != name:
            owner, _, attribute = name.rpartition(".")
            setattr(net.get_submodule(owner), attribute, net.get_parameter(kept))


def _chooses(model: Model) -> bool:
    """Whether any member, or one inside it, gives chosen layers or is pooled in a chosen way."""
    return any(bool(module.layers or module.pool) for module in model.modules()
               if isinstance(module, Member))
