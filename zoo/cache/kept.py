"""Large files that zoo can make again, in a folder of limited size: those last used stay.

Each is a safetensors file that says in its header what it holds. This module reads no tensors, so
that `zoo cache` starts without torch. Processes share the folder without locks: a file appears
whole (`zoo.atomic`), its time of change is the time of its last use, and a file that is deleted
while another process has it mapped lives on there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zoo.atomic import delete_leftovers
from zoo.cache import cache_folder, read_json, write_json
from zoo.errors import OptionError, ZooError

SUFFIX = ".safetensors"
MOST = 5 * 2**30  # by default, where the disk has room for four times as much

_SETTINGS = "settings.json"
_STALE_SECONDS = 24 * 3600  # a file that was being written this long ago never will be whole


@dataclass(frozen=True)
class KeptFile:
    """A file, its size in bytes, when it was last used (seconds since 1970) and what it says of
    itself."""

    file: Path
    size: int
    used: float
    about: Mapping[str, str]


def kept_folder() -> Path:
    return cache_folder() / "features"


def kept_files() -> list[KeptFile]:
    """What is kept, last used first."""
    found = [KeptFile(file, size, used, _about(file)) for file, size, used in _files()]
    return sorted(found, key=lambda kept: -kept.used)


def other_files() -> tuple[int, int]:
    """How many other files the cache folder has (names and catalogues), and their bytes."""
    sizes = []
    for file in cache_folder().rglob("*"):
        with suppress(OSError):  # another process has replaced it
            if file.is_file() and kept_folder() not in file.parents:
                sizes.append(file.stat().st_size)
    return len(sizes), sum(sizes)


def limit() -> int:
    """The most bytes that are kept: `ZOO_CACHE_LIMIT`, or what `set_limit` wrote, or 5 GiB but no
    more than a quarter of the disk's free room. 0 keeps nothing. Raises OptionError for a
    `ZOO_CACHE_LIMIT` that is no size."""
    given = os.environ.get("ZOO_CACHE_LIMIT")
    if given:
        try:
            return parse_size(given)
        except ValueError as error:
            raise OptionError("ZOO_CACHE_LIMIT", str(error)) from None
    told = (read_json(cache_folder() / _SETTINGS) or {}).get("limit")
    if isinstance(told, int) and told >= 0:
        return told
    folder = kept_folder()
    while not folder.is_dir():
        folder = folder.parent
    total = sum(size for _, size, _ in _files())
    try:
        return min(MOST, (shutil.disk_usage(folder).free + total) // 4)
    except OSError:
        return 0


def set_limit(size: int) -> None:
    """Write the limit down for all processes to come, and delete what is too much. Raises
    ZooError when the cache folder cannot be written."""
    file = cache_folder() / _SETTINGS
    if not write_json(file, {**(read_json(file) or {}), "limit": size}):
        raise ZooError(f"{file} cannot be written; set ZOO_CACHE_LIMIT, or ZOO_CACHE to a folder "
                       "that can be")
    make_room(0)


def make_room(size: int) -> bool:
    """Delete files, those not used for longest first, until so many bytes more are within the
    limit. False when that cannot be. What killed processes left half-written goes too."""
    most = limit()
    if size > most:
        return False
    if kept_folder().is_dir():
        delete_leftovers(kept_folder(), _STALE_SECONDS)
    files = sorted(_files(), key=lambda each: each[2])
    total = sum(each for _, each, _ in files)
    for file, each, _ in files:
        if total + size <= most:
            break
        if _delete(file):
            total -= each
    return total + size <= most


def clear(older_than: float = 0) -> tuple[int, int]:
    """Delete what was not used for so many seconds; how many files that were, and their bytes."""
    now = time.time()
    gone = [size for file, size, used in _files() if now - used >= older_than and _delete(file)]
    return len(gone), sum(gone)


def touch(file: Path) -> None:
    """Note that a file was used just now, where the folder can be written."""
    with suppress(OSError):
        os.utime(file)


def parse_size(text: str) -> int:
    """`2GB`, `500MB`, `64KB` or a number, in bytes; 1 KB is 1,000 bytes, 1 KiB is 1,024. Raises
    ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is no size; write 2GB, 500MB or a number of bytes")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


def _files() -> Iterator[tuple[Path, int, float]]:
    """Each kept file, its size and when it was last used."""
    try:
        entries = list(os.scandir(kept_folder()))
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):  # another process has deleted it
            if entry.name.endswith(SUFFIX) and entry.name[0] != "." and entry.is_file():
                stat = entry.stat()
                yield Path(entry.path), stat.st_size, stat.st_mtime


def _delete(file: Path) -> bool:
    """Whether a file is gone now: not every folder can be written, and not every system deletes
    what another process has mapped."""
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _about(file: Path) -> dict[str, str]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length < 2**20 else {}
        about = header.get("__metadata__", {})
        return {str(name): str(text) for name, text in about.items()}
    except (OSError, ValueError, AttributeError):
        return {}
