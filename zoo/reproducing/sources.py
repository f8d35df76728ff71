"""The models that a provenance names, found again: given by hand, at their commits, by name, or
made again from their own sources."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.assembly import backbone
from zoo.blueprints import Blueprint
from zoo.errors import BadName, ProvenanceError, UnknownName, ZooError
from zoo.model import Model
from zoo.names import Address, Name, parse, suggest
from zoo.store import load, network
from zoo.tensors.digest import digest

_COMMIT = re.compile(r"[0-9a-f]{40}")


class Given:
    """What a user has for sources that cannot be found otherwise: by name, by number (`1`, `2`, …
    in their order; `1.2` is the second source of the first), as `base`, or as `teacher1`. Each is
    to be asked for."""

    def __init__(self, reference: str, places: Mapping[str, str | os.PathLike[str]]) -> None:
        self._reference = reference
        self._places = {str(key): place for key, place in places.items()}
        self._names: list[str] = []
        self._used: set[str] = set()

    def get(self, label: str, name: str) -> str | os.PathLike[str] | None:
        """The place for the source with this number (or `base`) and name."""
        self._names += [label, name]
        for key in (label, name):
            if key in self._places:
                self._used.add(key)
                return self._places[key]
        return None

    def want_used(self) -> None:
        """Raises ProvenanceError for a place that no source was taken from."""
        for key in sorted(self._places.keys() - self._used):
            near = suggest(key, self._names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else (
                f"there are {', '.join(dict.fromkeys(self._names)) or 'none'}")
            raise ProvenanceError(self._reference, f"it has no source {key!r}; {hint}")


def found(
    reference: str, told: Mapping[str, Any], label: str, given: Given, built: Blueprint | None,
    remade: Callable[[Mapping[str, Any]], Model],
) -> Model:
    """A source of a model, on the CPU, the very weights where their hash is recorded, and built as
    recorded where the model has no part that says it.

    reference: the model, for errors. told: what its provenance says of the source. label: its
    number, `base`, or `teacher` or `member` with a number. built: how the network that it became
    is built, where there is one. remade: makes a fusion again from its recipe.
    Raises ProvenanceError, which says what to do.
    """
    name = str(told.get("name", ""))
    place = given.get(label, name)
    who = f"its {_spelled(label)} ({name})"
    ways = _ways(told, built, remade)
    if place is not None:
        ways = iter([lambda: load(place, device="cpu")])
    wanted = told.get("state_sha256")
    problems = []
    for way in ways:
        try:
            model = way()
        except ProvenanceError as error:
            problems.append(error.problem)
            continue
        except ZooError as error:
            if place is not None:
                raise
            problems.append(str(error))
            continue
        if wanted is not None and not _rounded_to(model, wanted):
            problems.append("")
        elif "model" in told and _acts(model.describe()) != _acts(told["model"]):
            problems.append("it has the right weights and is built otherwise: another image size, "
                            "activation, preprocessing or order of classes")
        else:
            return model
    if place is not None:
        why = problems[0] or (f"it has other weights than those that {_role(label)} (sha256 "
                              f"{str(wanted)[:12]}…)")
        raise ProvenanceError(reference, f"{place} is not {who}: {why}")
    raise ProvenanceError(reference, _why(who, told, label, problems))


def _rounded_to(model: Model, wanted: str) -> bool:
    """Whether these are its weights, as they are or in the half precision in which it was built or
    loaded; then they are rounded to it."""
    if digest(network(model).state_dict()) == wanted:
        return True
    for dtype in (torch.bfloat16, torch.float16):
        rounded = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                   for key, tensor in network(model).state_dict().items()}
        if digest(rounded) == wanted:
            model.to(dtype=dtype)
            return True
    return False


def _acts(described: Mapping[str, Any]) -> Any:
    """Of how a model is built, all that its answers depend on beside weights and architecture."""
    members = [_acts(each["model"]) if "model" in each else {
        "preprocessing": each["preprocessing"], "activation": each["build"].get("activation"),
        **{key: each.get(key) for key in ("classes", "gives", "layers", "pool")},
    } for each in described["members"]]
    return json.loads(json.dumps(
        {"classes": described["classes"], "fusion": described["fusion"], "members": members}))


def _spelled(label: str) -> str:
    """`teacher1` as people say it; of a source the number alone stands for it."""
    match = re.fullmatch(r"(teacher|member)(\d+)", label)
    return f"{match[1]} {match[2]}" if match else label if label == "base" else f"source {label}"


def _role(label: str) -> str:
    return "taught" if re.fullmatch(r"teacher\d+", label) else "were fused"


def _why(who: str, told: Mapping[str, Any], label: str, problems: list[str]) -> str:
    say = f"if you have it, say where: --source {label}=PATH (sources={{'{label}': …}})"
    trained = (told.get("recipe") or {}).get("transfers")
    if trained:
        methods = ", ".join(dict.fromkeys(str(each.get("method")) for each in trained))
        then = "taught" if _role(label) == "taught" else "was fused"
        return (f"{who} was trained by {methods} before it {then}, and its weights are not "
                f"published; {say}")
    failed = next(filter(None, problems), "")
    if failed:
        return f"{who} cannot be had: {failed.rstrip('.')}. Otherwise, {say}"
    if problems and (told.get("recipe") or {}).keys() & {"strategy", "fresh"}:
        return (f"{who} comes out with other weights when it is made again than those that "
                f"{_role(label)}; {say}")
    if problems:
        return (f"{who} was changed after it was fetched: its weights have another hash than "
                f"those that {_role(label)}; {say}")
    return f"{who} says nothing of where its weights are published; {say}"


def _ways(
    told: Mapping[str, Any], built: Blueprint | None, remade: Callable[[Mapping[str, Any]], Model]
) -> Iterator[Callable[[], Model]]:
    """How the source may be had, the likeliest first."""
    name = _registered(told)
    commit = str(told.get("revision", ""))
    # Built by its name, it records the hash of one file; loaded from an address, it does not.
    if name and isinstance(told.get("sha256"), str):
        yield lambda: _by_name(name, told, built)
    if told.get("repository") and _COMMIT.fullmatch(commit):
        address = Address("hf-hub", str(told["repository"]), commit)
        yield lambda: load(address, device="cpu")
        if built and (built.image_size or built.activation):
            yield lambda: backbone(str(address), image_size=built.image_size,
                                   activation=built.activation, device="cpu")
    recipe = told.get("recipe")
    if not isinstance(recipe, Mapping) or recipe.get("transfers"):
        recipe = {}
    if recipe.get("strategy"):
        yield lambda: remade(recipe)
    elif name and recipe.get("fresh"):
        yield lambda: _fresh(name, recipe["fresh"], built)
    elif name and (told.get("url") or told.get("package")):
        yield lambda: _by_name(name, told, built)


def _registered(told: Mapping[str, Any]) -> str | None:
    """The source's name, where it is a registered one and no path or address."""
    try:
        name = parse(str(told.get("name", "")))
    except BadName:
        return None
    return str(name) if isinstance(name, Name) else None


def _fresh(name: str, told: Mapping[str, Any], built: Blueprint | None) -> Model:
    """The random network that it was before it was trained."""
    return backbone(name, classes=told["classes"], seed=int(told["seed"]), device="cpu",
                    dtype=told.get("dtype"), **_options(built))


def _options(built: Blueprint | None) -> dict[str, Any]:
    return {"in_chans": built.in_chans, "image_size": built.image_size,
            "activation": built.activation, **built.options} if built else {}


def _by_name(name: str, told: Mapping[str, Any], built: Blueprint | None) -> Model:
    try:
        model = backbone(name, pretrained=True, device="cpu", **_options(built))
    except UnknownName as error:
        raise ZooError(str(error)) from None
    now = next(model.each_member()).source.get("sha256")
    if told.get("sha256") and now and now != told["sha256"]:
        raise ZooError(f"{name} has other weights today (sha256 {now[:12]}…) than then "
                       f"({str(told['sha256'])[:12]}…)")
    return model


def place_of(reference: str, told: Mapping[str, Any], label: str, given: Given) -> Path | str:
    """Where a file or folder of weights that was merged lies: a path, or an address at a commit.

    Raises ProvenanceError where only its author has it.
    """
    name = str(told.get("name", ""))
    place = given.get(label, name)
    if place is not None:
        return str(place) if isinstance(place, str) else Path(place)
    commit = str(told.get("revision", ""))
    if told.get("repository") and _COMMIT.fullmatch(commit):
        return str(Address("hf-hub", str(told["repository"]), commit))
    raise ProvenanceError(reference, f"its source {label} ({name}) lay on its author's machine and "
                          f"is not published; if you have it, say where: --source {label}=PATH "
                          f"(sources={{'{label}': …}})")
