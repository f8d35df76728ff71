"""Pull a repository: into the Hub's cache, or as a folder of one's own."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from zoo.atomic import atomic_folder
from zoo.errors import DiskFull
from zoo.hub.repository import repository_of
from zoo.names import Address
from zoo.store import read_config
from zoo.store.contents import CONFIG, ORIGIN, is_published
from zoo.store.fetching import hub_folder
from zoo.store.folders import is_only_a_model
from zoo.store.links import fetch_links, read_links
from zoo.tensors import open_tensors


def pull(repository: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Fetch a model from the Hub, at one commit, complete and checked.

    repository: `org/name`, `org/name@rev` or its `hf-hub:` address. out: a folder to write, which
    appears as a whole and remembers repository and commit; by default the model stays in the
    Hub's cache, from which `zoo.load("hf-hub:…")` takes it too.
    Gives the folder. Raises WeightsError when it cannot be had or has changed, FormatError when
    it is no model or `out` holds other things, DiskFull.
    """
    name, revision = repository_of(repository)
    cached, origin = hub_folder(Address("hf-hub", name, revision))
    config = read_config(cached)
    open_tensors(cached)
    fetch_links(f"{name}@{origin['revision']}", read_links(cached / CONFIG, config.get("zoo")))
    if out is None:
        return cached
    folder = Path(out).expanduser()
    files = [file for file in sorted(cached.iterdir()) if is_published(file.name)]
    with atomic_folder(folder, is_only_a_model) as fresh:
        needed = sum(file.stat().st_size for file in files)
        free = shutil.disk_usage(fresh).free
        if free < needed:
            raise DiskFull(folder, needed, free)
        for file in files:
            shutil.copyfile(file, fresh / file.name)
        (fresh / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")
    return folder
