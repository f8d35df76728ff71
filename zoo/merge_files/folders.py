"""The folder around merged weights: where inputs lie, and what else belongs into the result."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zoo.atomic import atomic_folder, atomic_path, current_folder, leads_outside
from zoo.errors import BadName, FormatError, FusionError
from zoo.names import MODEL_SCHEMES, Address, is_path, parse
from zoo.tensors import open_tensors, sha256_file

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

# Of the first input, what a reader of the result needs: tokenizer, preprocessing, licence.
_BESIDE = re.compile(r".+\.(json|txt|model|jinja|tiktoken|vocab|yaml)|LICEN[CS]E.*|NOTICE.*")
_WRITTEN = re.compile(_BESIDE.pattern + r"|README\.md|.+\.safetensors(\.index\.json)?")
_MOST_BYTES = 64 << 20
_OF_A_FUSION = ("strategy", "options", "weight", "seed", "sources", "base")


def located(given: str | os.PathLike[str]) -> tuple[Path, dict[str, str]]:
    """Where an input lies on this machine; of one from the Hub, also which commit it is.

    A plain string is a path, unless it is an address.
    """
    if isinstance(given, str) and not is_path(given) and re.match(r"[a-z][a-z0-9-]+:", given):
        reference = parse(given)
        assert isinstance(reference, Address)
        if reference.scheme not in MODEL_SCHEMES:
            raise BadName(given, "a model's address is 'hf-hub:…' or 'local-dir:…'")
        if reference.scheme == "hf-hub":
            from zoo.store.fetching import hub_folder  # imports timm, which paths do without

            return hub_folder(reference)
        given = reference.location
    return current_folder(Path(given).expanduser()), {}


def source(given: str | os.PathLike[str], place: Path, origin: Mapping[str, str],
           files: Sequence[Path], hashes: bool) -> dict[str, Any]:
    """What the result says of an input. A path on this machine says nothing to others: its last
    part does."""
    told: dict[str, Any] = {"name": origin.get("repository") or Path(given).name, **origin}
    ours = config_of(place).get("zoo", {})
    if ours.get("links"):
        raise FormatError(place, "has only a part of its weights, its members link to others; "
                          "zoo.save(zoo.load(…), out) writes a folder with all of them")
    made = ours.get("made_with", {})
    if "sources" in made:  # it is a fusion itself
        told["made_with"] = {name: made[name] for name in _OF_A_FUSION if name in made}
    if hashes:
        told["sha256"] = {file.name: sha256_file(file) for file in files}
    else:
        recorded = made.get("sha256")
        if recorded:
            told["sha256"] = recorded
    return told


def config_of(place: Path) -> dict[str, Any]:
    """The configuration beside the weights; {} where there is none."""
    file = (place if place.is_dir() else place.parent) / CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(file, f"is damaged: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(file, "is damaged: it is no JSON object")
    return config


def want_same_labels(strategy: str, names: Sequence[str], places: Sequence[Path]) -> None:
    """Raises FusionError when the rows of the classifiers are known to mean different labels."""
    told = [(name, labels) for name, place in zip(names, places, strict=True)
            if (labels := _labels(config_of(place)))]
    for name, labels in told[1:]:
        if labels != told[0][1]:
            order = "in another order" if set(labels) == set(told[0][1]) else "that differ"
            raise FusionError(strategy, f"{told[0][0]} and {name} have labels {order}, and files "
                              "are merged row by row", "Use zoo.fuse (`zoo fuse`), which matches "
                              "classifiers by label name")


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The label names in the order of the classifier's rows; () where the file does not say."""
    model = config.get("zoo", {}).get("model") or {}
    names = model.get("classes") or config.get("label_names") or config.get("id2label")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=lambda key: (len(key), key))]
    return tuple(map(str, names)) if isinstance(names, list) else ()


@contextmanager
def written(
    out: Path, first: Path, made: Mapping[str, Any], pooled_norms: bool
) -> Iterator[Path]:
    """Where to put the weights of the result, which appears when the block ends without an error:
    a file, or a folder with the first input's configuration and what lies beside it."""
    if out.suffix == ".safetensors":
        with atomic_path(out) as temporary:
            yield temporary
        return
    with atomic_folder(out, _may_replace) as fresh:
        for file in sorted(first.iterdir()) if first.is_dir() else ():
            if (file.is_file() and _BESIDE.fullmatch(file.name) and file.name != CONFIG
                    and not file.name.endswith(".safetensors.index.json")
                    and not leads_outside(file)
                    and file.stat().st_size <= _MOST_BYTES):
                shutil.copyfile(file, fresh / file.name)
        yield fresh / WEIGHTS
        config = _told(config_of(first), made, pooled_norms)
        (fresh / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (fresh / "README.md").write_text(_card(config, made), "utf-8")


def _told(config: dict[str, Any], made: Mapping[str, Any], pooled_norms: bool) -> dict[str, Any]:
    """The configuration with what was done, under the one key that is ours."""
    ours = {"format": 1, "requires": [], "must_understand": [], **config.get("zoo", {}),
            "made_with": dict(made)}
    members = ours.get("model", {}).get("members", [])
    if len(members) == 1:
        fusion = {"strategy": made["strategy"], "kind": "weights", "options": made["options"]}
        norms = {"norms": "pooled"} if pooled_norms else {}
        ours["model"] = {**ours["model"], "fusion": fusion, "members": [{**members[0], **norms}]}
    return {**config, "zoo": ours}


def _card(config: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    repositories = sorted({told["repository"] for told in made["sources"] if "repository" in told})
    front = ["---", "tags: [merge, fusion-zoo]"]
    if repositories:
        front += [f"base_model: [{', '.join(repositories)}]", "base_model_relation: merge"]
    names = ", ".join(f"`{told['name']}`" for told in made["sources"])
    what = config.get("architecture") or config.get("model_type") or "model"
    return "\n".join([
        *front, "---", "", f"# A merged {what}", "",
        f"The weights of {names}, merged by `{made['strategy']}`"
        + (f" from the base `{made['base']['name']}`" if "base" in made else "") + ".",
        "", "## Made with", "", "```json", json.dumps(made, indent=2), "```", ""])


def _may_replace(folder: Path) -> bool:
    """Whether it is an earlier result of a merge, or a saved model, and nothing else."""
    if not all(file.is_file() and _WRITTEN.fullmatch(file.name) for file in folder.iterdir()):
        return False
    try:
        return "zoo" in config_of(folder) and bool(open_tensors(folder))
    except FormatError:
        return False
