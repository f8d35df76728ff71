"""Pull a repository: into the Hub's cache, or as a folder of one's own."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from zoo.atomic import atomic_folder
from zoo.errors import DiskFull, FormatError, MissingPlugin, PluginError
from zoo.hub.repository import repository_of
from zoo.names import Address
from zoo.store import read_config
from zoo.store.contents import CONFIG, ORIGIN, is_published
from zoo.store.fetching import hub_folder, origin_of
from zoo.store.folders import is_only_a_model, want_loadable
from zoo.store.links import read_links
from zoo.store.rebuilding import rebuild_linked
from zoo.tensors import open_tensors


def pull(repository: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Fetch a model from the Hub, at one commit, complete and checked.

    repository: `org/name`, `org/name@rev` or its `hf-hub:` address. out: a folder to write, which
    appears as a whole and remembers repository and commit, replaced if it was pulled before; by
    default the model stays in the Hub's cache, from which `zoo.load("hf-hub:…")` takes it too.
    Gives the folder. Raises WeightsError when it cannot be had or has changed, FormatError when
    it is no model or `out` holds other things, also a model that was saved there, DiskFull. Warns
    where a plugin is missing, without which the members in other repositories are not fetched: how
    large they may be is not known.
    """
    name, revision = repository_of(repository)
    cached, origin = hub_folder(Address("hf-hub", name, revision))
    config = read_config(cached)
    open_tensors(cached)
    _fetch_members(f"{name}@{origin['revision']}", cached / CONFIG, config)
    if out is None:
        return cached
    folder = Path(out).expanduser()
    files = [file for file in sorted(cached.iterdir()) if is_published(file.name)]
    with atomic_folder(folder, _was_pulled) as fresh:
        needed = sum(file.stat().st_size for file in files)
        free = shutil.disk_usage(fresh).free
        if free < needed:
            raise DiskFull(folder, needed, free)
        for file in files:
            shutil.copyfile(file, fresh / file.name)
        (fresh / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    return folder


def _was_pulled(folder: Path) -> bool:
    """Whether it can be had again. Raises FormatError for a model that may be nowhere else."""
    if is_only_a_model(folder) and not origin_of(folder):
        raise FormatError(folder, "is a model that was saved here and not pulled, and would be "
                          "lost; delete it or choose another folder")
    return is_only_a_model(folder)


def _fetch_members(place: str, file: Path, config: dict[str, Any]) -> None:
    """Bring the members that lie in other repositories, if the model that the config describes has
    room for them."""
    links = read_links(file, config.get("zoo"))
    if not links:
        return
    try:
        want_loadable(file, config["zoo"])
        with torch.random.fork_rng(devices=[]):
            rebuild_linked(file, config, links, place)
    except (MissingPlugin, PluginError) as error:
        warnings.warn(f"members of {place} lie in other repositories, and are fetched once it can "
                      f"be loaded: {error}", stacklevel=3)
