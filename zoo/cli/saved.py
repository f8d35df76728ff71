"""A saved model's config, without building it: no torch, no plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.errors import FormatError
from zoo.names import Address, is_path, parse


def saved_folder(given: str) -> Path | None:
    """The folder that is meant, where a path, `local-dir:` or an existing folder is typed."""
    if Path(given).is_dir():
        return Path(given)
    if is_path(given):
        return Path(given).expanduser()
    if given.startswith("local-dir:"):
        address = parse(given)
        assert isinstance(address, Address)
        return Path(address.location).expanduser()
    return None


def saved_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises FormatError when there is none to read."""
    file = folder / "config.json"
    if not folder.exists():
        raise FormatError(folder, "there is no such folder")
    if not file.is_file():
        raise FormatError(folder, "is no saved model: it has no config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(file, f"is damaged: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(file, "is damaged: it is no JSON object")
    return config


def about(folder: Path, config: dict[str, Any]) -> list[str]:
    """What a person wants to know of a saved model, in lines. Raises FormatError when the config
    has another shape than the one we write."""
    try:
        return _about(folder, config)
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(folder / "config.json",
                          f"is damaged: {type(error).__name__}: {error}") from None


def _about(folder: Path, config: dict[str, Any]) -> list[str]:
    ours = config.get("zoo", {})
    model = ours.get("model", {})
    made = ours.get("made_with", {})
    fusion = model.get("fusion")
    members = model.get("members", [])
    names = ", ".join(member["name"] for member in members)
    what = f"{names} fused by {fusion['strategy']}" if fusion and len(members) > 1 else (
        f"{names or config.get('architecture', 'a model')}"
        + (f", made by {fusion['strategy']}" if fusion else ""))
    lines = [f"{folder}: {what}"]
    classes = model.get("classes") or config.get("label_names") or []
    few = f" ({', '.join(classes[:10])}{', …' if len(classes) > 10 else ''})" if classes else ""
    lines.append(f"  classes: {len(classes) or config.get('num_classes', '?')}{few}")
    lines += [f"  member: {member['name']}, {member['dim']} features, batch norm {member['norms']}"
              for member in members]
    lines += [f"  linked: {link.get('member')} is not in this folder; its {_bytes(link)} "
              f"in hf-hub:{link['repository']}@{link['revision']}"
              for link in (ours.get("links") or {}).values()]
    if ours.get("requires"):
        lines += [f"  requires: {line}" for line in _required(folder / "config.json", ours)]
    for source in made.get("sources", []):
        told = "".join(f", {key} {source[key]}" for key in ("repository", "revision", "license")
                       if source.get(key))
        lines.append(f"  source: {source.get('name')}{told}")
    lines += [f"  made with: {name} {version}"
              for name, version in made.get("versions", {}).items()]
    return lines


def _bytes(link: Mapping[str, Any]) -> str:
    """How large a linked member is, where that stands there."""
    size = link.get("bytes")
    return f"{size:,} bytes are" if type(size) is int and size >= 0 else "weights are"


def _required(file: Path, ours: Mapping[str, Any]) -> Iterator[str]:
    """What the file says that a loader needs and, where it is not there, what to do."""
    from zoo.requirements import missing, requirements

    for namespace, wanted in requirements(file, ours):
        lacking = missing(namespace, wanted, str(file))
        if lacking is None:
            yield f"{wanted} (namespace {namespace})"
            continue
        found = f"{lacking.found} is installed" if lacking.found else "not installed"
        beware = f"; beware: it is known to be {lacking.known}'s" if lacking.known else ""
        yield (f"{wanted} (namespace {namespace}); {found}{beware}; if you trust this file: "
               f"{lacking.install}")
