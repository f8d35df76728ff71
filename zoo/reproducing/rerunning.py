"""Run again what a saved model says was done."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.assembly import fuse
from zoo.blueprints import Blueprint
from zoo.device import resolve_device
from zoo.errors import BadName, FormatError, ProvenanceError, ZooError
from zoo.fusion.norms import norm_keys
from zoo.hub.repository import repository_of
from zoo.merge_files import merge
from zoo.merge_files.folders import config_of, located
from zoo.model import Model
from zoo.names import Address, is_path, parse
from zoo.registry import find
from zoo.reproducing.choosing_again import (
    choose_again,
    number_of,
    want_choice,
    why_not_chosen,
)
from zoo.reproducing.comparing import Difference, Reproduction, compared, precision
from zoo.reproducing.retraining import (
    Images,
    compare_data,
    teachers_of,
    train,
    trained_before,
    why_not_trained,
)
from zoo.reproducing.sources import Given, found, place_of
from zoo.specs import FusionSpec
from zoo.store import load, network
from zoo.store.timm_layout import want_sane
from zoo.tensors import open_tensors, sha256_file
from zoo.tensors.header import parse_object

# How many fusions may be sources of each other: a file says so, and each costs a download.
_DEEPEST = 8
_SEES = frozenset({"data", "labels", "score"})


def reproduce(
    reference: str | os.PathLike[str],
    *,
    sources: Mapping[str, str | os.PathLike[str]] | None = None,
    data: Any = None,
    val: Any = None,
    unlabelled: Any = None,
    choice: bool = False,
    tolerance: float = 1e-3,
    device: str | torch.device | None = None,
) -> Reproduction:
    """Make a saved model again from its provenance, and compare it tensor by tensor.

    Its sources are fetched at their recorded commits, or built by their names, and their hashes
    compared with those of what was fused. A fusion that looked at no data must come out bit for
    bit; what was trained or fitted needs the data, and must be within the tolerance.

    reference: `org/name`, an address (`hf-hub:org/name@rev`), a folder, or a file that `merge`
        wrote. sources: paths or addresses of those that are not published: by their name, by their
        number (`"1"`, `"2"`, …), as `"base"`, or as `"teacher1"`, `"teacher2"`, …, counted through
        all that it was trained by. data: what it was trained or fitted on; without it, what
        depends on it is left unchecked. val: on which the training chose its best epoch, where
        that was no share of `data`. unlabelled: to which the training adapted. choice: of a
        model that `auto` chose, have it choose again on `data`, and compare its ranking too.
        tolerance: of what was trained or fitted: largest difference of two numbers as a share of
        the largest one in the tensor. device: to compute on, by default the kind that it was made
        on where there is one.

    Raises ProvenanceError when what the model says of itself does not suffice, FormatError when it
    is damaged, WeightsError when it cannot be had.
    """
    address, spelling = _reference(reference)
    place, _ = located(str(address) if isinstance(address, Address) else address)
    if not 0 <= tolerance < 1:
        raise ZooError(f"tolerance is {tolerance}, expected a share in [0, 1)")
    made = _provenance(spelling, place)
    given = Given(spelling, sources or {})
    try:
        if "kind" not in made and made.get("strategy"):
            return _merged(spelling, place, made, given)
        images = Images(data, val, unlabelled)
        if choice:
            want_choice(spelling, made.get("auto"), data)
        return _Rerun(spelling, address, made, given, images, tolerance, device).done(choice)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ZooError):
            raise
        raise FormatError(place, f"its provenance is damaged ({type(error).__name__}: "
                          f"{error})") from error


class _Rerun:
    """A model of networks, made again. What could not be done is collected on the way."""

    def __init__(
        self, reference: str, address: Address | Path, made: Mapping[str, Any], given: Given,
        images: Images, tolerance: float, device: str | torch.device | None,
    ) -> None:
        self._reference = reference
        self._saved = load(address, device="cpu")
        self._made = made
        self._given = given
        self._images = images
        self._data = images.data
        self._tolerance = tolerance
        self._notes: list[str] = []
        self._device = self._where(device)

    def done(self, choice: bool) -> Reproduction:
        made, saved = self._made, self._saved
        if made.get("auto") and not choice:
            why = why_not_chosen(made["auto"]) or "choice=True (--choice), with data, does that too"
            self._notes.append("auto chose this fusion; it is made again, and the choice is not: "
                               + why)
        tried = self._tried(made, saved) if choice else None
        alone = number_of(saved, made["auto"]) if choice else None
        transfers = made.get("transfers") or ()
        unchecked: set[str] = set()
        if tried and alone is not None:
            model, transfers = tried[0][alone], ()
            self._notes.append(f"auto chose its member {alone + 1} as it was; how that was made is "
                               "not made again")
        elif made.get("strategy"):
            model, unchecked = self._fused(made, saved.describe())
        else:
            built = next(saved.each_member()).blueprint
            told = {**made["sources"][0], "recipe": {"fresh": made.get("fresh")}}
            model = found(self._reference, told, "1", self._given, built, _no_recipe)
        self._images.want_used(self._reference, transfers)
        done = trained_before(model, transfers, self._notes)
        why = why_not_trained(transfers[done:], self._images)
        teachers = [] if why else teachers_of(transfers, done, self._apart)
        if not (why and any(each.get("teachers") for each in transfers)):  # none was asked for
            self._given.want_used()
        if why:
            self._notes.append(why)
        else:
            train(model.to(self._device), transfers[done:], teachers, self._images, self._notes)
        model.cpu()
        rounded = precision(network(saved).state_dict())
        if rounded and precision(network(model).state_dict()) not in (None, rounded):
            model.to(dtype=rounded)
            self._notes.append(f"it was saved in {str(rounded).removeprefix('torch.')}, and is "
                               "compared after the same rounding")
        kept, now = network(saved).state_dict(), network(model).state_dict()
        looked = bool(transfers) or any(made.get(key) for key in ("looked_at", "search",
                                                                  "fitted_on"))
        exact, close, differing = compared(
            kept, now, self._tolerance if looked else 0.0, unchecked)
        if why:  # which of them the training changed is not known
            unchecked |= {each.tensor for each in differing}
            differing = ()
        elif model.classes != saved.classes:
            differing += (Difference("classes", f"are {list(model.classes)[:10]}, and were saved "
                                     f"as {list(saved.classes)[:10]}"),)
        chosen = choose_again(made["auto"], *tried, self._data, self._device, self._tolerance,
                              self._notes) if tried else None
        return Reproduction(
            self._reference, exact, close, self._tolerance if looked else 0.0, differing,
            tuple(sorted(unchecked & kept.keys())), _versions(made), tuple(self._notes), chosen)

    def _where(self, device: str | torch.device | None) -> torch.device:
        told = [self._made, *(self._made.get("transfers") or ())]
        recorded = next((str(each["device"]) for each in told if each.get("device")), "cpu")
        if device is not None:
            where = resolve_device(device)
        else:
            there = torch.device(recorded).type in ("cpu", "cuda", "mps") and (
                recorded == "cpu" or getattr(torch, recorded).is_available())
            where = resolve_device(recorded if there else "cpu")
        if where.type != recorded:
            self._notes.append(f"it was made on {recorded} and is made again on {where.type}, "
                               "which may round differently")
        return where

    def _fused(
        self, recipe: Mapping[str, Any], like: Mapping[str, Any], above: tuple[str, ...] = ()
    ) -> tuple[Model, set[str]]:
        """A fusion made again, and the keys of what could not be. like: how it is built. above: the
        labels of the sources that it is a source of."""
        spec = find(str(recipe["strategy"]), FusionSpec)
        self._want_data(spec, recipe)
        models, base = self._sources(recipe, like, above)
        search = (recipe.get("search") or {}).get("space") or {}
        looked = recipe.get("looked_at") or recipe.get("search") or _reestimated(like)
        options = {key: value for key, value in recipe["options"].items() if key not in search}
        settings: dict[str, Any] = {}
        if spec.kind == "weights":
            with_data = self._data is not None and bool(looked)
            settings = {"weight": recipe.get("weight"),
                        "norms": (recipe.get("asked_norms") or "auto") if with_data else "pooled"}
            if search:
                settings["search"] = search
        elif spec.kind == "features":
            settings = {name: recipe[name] for name in ("classes", "layer", "pool")
                        if recipe.get(name)}
        fitted = recipe.get("fitted_on")
        uses = looked if spec.kind == "weights" else fitted
        again = fuse(models, spec.name, base=base, data=self._data if uses else None,
                     device=self._device, dtype=recipe.get("dtype"), seed=int(recipe["seed"]),
                     **settings, **options)
        return again, self._unchecked(spec, again, recipe, like)

    def _sources(
        self, recipe: Mapping[str, Any], like: Mapping[str, Any], above: tuple[str, ...] = ()
    ) -> tuple[list[Model], Model | None]:
        """What was fused, and its base."""
        if len(above) > _DEEPEST:
            raise ProvenanceError(self._reference, f"its sources are fusions of fusions, more than "
                                  f"{_DEEPEST} deep")
        blueprints = [_blueprint(member) for member in like["members"]]
        inner = [member.get("model", like) for member in like["members"]]
        told = list(recipe["sources"])
        if len(blueprints) != len(told):  # their weights became one network
            blueprints, inner = blueprints[:1] * len(told), inner[:1] * len(told)

        def source(told: Mapping[str, Any], label: str, built: Blueprint | None,
                   of: Mapping[str, Any]) -> Model:
            path = (*above, label)
            if "model" in told:
                of = told["model"]
                built = _blueprint(of["members"][0])
            return found(self._reference, told, ".".join(path), self._given, built,
                         lambda nested: self._nested(nested, of, path))

        models = [source(each, str(number), built, of) for number, (each, built, of) in enumerate(
            zip(told, blueprints, inner, strict=True), 1)]
        base = recipe.get("base")
        if base is not None:
            base = source(base, "base", blueprints[0], inner[0])
        return models, base

    def _tried(
        self, made: Mapping[str, Any], saved: Model
    ) -> tuple[list[Model], Model | None]:
        """The members among which auto chose, and the base that it was given."""
        auto = made["auto"]
        if "sources" not in auto:
            models, base = self._sources(made, saved.describe())
        else:
            models, base = [self._apart(each, f"member{number}")
                            for number, each in enumerate(auto["sources"], 1)], None
        return models, self._apart(auto["base"], "base") if auto.get("base") else base

    def _apart(self, told: Mapping[str, Any], label: str) -> Model:
        """A model that is no part of this one, and of which the recipe says how it is built."""
        like = told.get("model") or {"members": [{}]}
        return found(self._reference, told, label, self._given, _blueprint(like["members"][0]),
                     lambda nested: self._nested(nested, like, (label,)))

    def _nested(
        self, recipe: Mapping[str, Any], like: Mapping[str, Any], above: tuple[str, ...]
    ) -> Model:
        model, unchecked = self._fused(recipe, like, above)
        if unchecked:
            raise ProvenanceError(self._reference, "it is a fusion that was fitted on data")
        return model.cpu()

    def _want_data(self, spec: FusionSpec, recipe: Mapping[str, Any]) -> None:
        """Raises ProvenanceError where nothing at all can be made without data."""
        looked = recipe.get("looked_at") or recipe.get("search")
        needs = spec.uses & _SEES or recipe.get("search") or (looked and spec.can_use & _SEES)
        if spec.kind == "weights" and needs and self._data is None:
            told = f" ({looked['images']} images)" if looked and "images" in looked else ""
            raise ProvenanceError(self._reference, f"{spec.name} looked at data{told}; pass the "
                                  "same: --data train.csv (data=…)")

    def _unchecked(
        self, spec: FusionSpec, again: Model, recipe: Mapping[str, Any], like: Mapping[str, Any]
    ) -> set[str]:
        if spec.kind == "weights":
            now = again.recipe.get("looked_at") or again.recipe.get("search")
            then = recipe.get("looked_at") or recipe.get("search")
            compare_data(then, now, self._notes)
            if now or not (then or _reestimated(like)):
                return set()
            keys = norm_keys(network(again))
            if keys:
                self._notes.append("batch norm's statistics came from data; pass the same to check "
                                   "them: --data train.csv (data=…)")
            return keys | {f"{key.rpartition('.')[0]}.num_batches_tracked" for key in keys}
        if not recipe.get("fitted_on"):
            return set()
        if self._data is not None:
            compare_data(recipe["fitted_on"], again.recipe.get("fitted_on"), self._notes)
            return set()
        self._notes.append(f"{spec.name} was fitted on {recipe['fitted_on'].get('images')} images; "
                           "pass the same to check it: --data val.csv (data=…)")
        return {key for key in again.state_dict() if key.startswith("fuser.")}


def _blueprint(member: Mapping[str, Any]) -> Blueprint | None:
    """How a member is built. Raises FormatError for sizes that no network has."""
    if "build" not in member:
        return None
    told = member["build"]
    want_sane(Path("config.json"), {"img_size": told.get("image_size"), **told,
                                    **(told.get("options") or {})})
    return Blueprint(**told)


def _reestimated(like: Mapping[str, Any]) -> bool:
    """Whether batch norm's statistics are of some data."""
    return any(member.get("norms") == "reestimated" for member in like["members"])


def _no_recipe(recipe: Mapping[str, Any]) -> Model:
    raise ZooError("it has no recipe of a fusion")


def _merged(
    reference: str, place: Path, made: Mapping[str, Any], given: Given
) -> Reproduction:
    """Files that were merged, merged again."""
    told = [(str(number), each) for number, each in enumerate(made["sources"], 1)]
    if made.get("base"):
        told.append(("base", made["base"]))
    places = [place_of(reference, each, label, given) for label, each in told]
    given.want_used()
    for (label, each), found_at in zip(told, places, strict=True):
        _want_same_files(reference, label, each, found_at)
    base = places.pop() if made.get("base") else None
    saved = open_tensors(place)
    with tempfile.TemporaryDirectory(prefix="zoo-reproduce-") as folder:
        out = merge(places, str(made["strategy"]), out=Path(folder) / "again.safetensors",
                    base=base, weight=made.get("weight"), dtype=made.get("dtype"),
                    rounding=made.get("rounding", "nearest"), seed=int(made["seed"]),
                    **made["options"])
        exact, close, differing = compared(saved, open_tensors(out), 0.0)
    return Reproduction(reference, exact, close, 0.0, differing, (), _versions(made))


def _want_same_files(
    reference: str, label: str, told: Mapping[str, Any], given: Path | str
) -> None:
    recorded = told.get("sha256")
    if not isinstance(recorded, Mapping):
        return
    for file in open_tensors(located(given)[0]).files:
        wanted = recorded.get(file.name)
        if wanted is not None and sha256_file(file) != wanted:
            raise ProvenanceError(reference, f"{given} is not its source {label} "
                                  f"({told.get('name')}): {file.name} has another sha256 than "
                                  f"{str(wanted)[:12]}…")


def _reference(given: str | os.PathLike[str]) -> tuple[Address | Path, str]:
    """`org/name` is on the Hub, unless it is a folder here."""
    if not isinstance(given, str) or is_path(given) or Path(given).exists():
        return Path(given), str(given)
    if re.match(r"[a-z][a-z0-9-]+:", given):
        address = parse(given)
        if not isinstance(address, Address):
            raise BadName(given, "expected org/name, hf-hub:org/name@rev, or a folder")
        return address, given
    repository, revision = repository_of(given)
    return Address("hf-hub", repository, revision), given


def _provenance(reference: str, place: Path) -> dict[str, Any]:
    """What was recorded, of a folder in its config, of a file in its metadata."""
    made: object = None
    if place.is_dir():
        ours = config_of(place).get("zoo")
        made = ours.get("made_with") if isinstance(ours, dict) else None
    else:
        text = open_tensors(place).metadata.get("made_with")
        made = parse_object(place, text.encode()) if text else None
    if not isinstance(made, dict) or not (made.get("strategy") or made.get("sources")):
        raise ProvenanceError(reference, "it says nothing of how it was made (zoo.made_with in "
                              "config.json); zoo writes that since it saves models")
    return made


def _versions(made: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The libraries whose versions are others than then; what comes after + is of the build."""
    now = {name: metadata.version(name) for name in ("torch", "timm")}
    now["fusion-zoo"] = zoo.__version__
    then = {name: str(version) for name, version in (made.get("versions") or {}).items()}
    return {name: (then[name], now[name]) for name in sorted(then.keys() & now.keys())
            if then[name].partition("+")[0] != now[name].partition("+")[0]}
