"""Hashes of files, kept as long as the files stay the same."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from zoo.cache import cache_folder, read_json, write_json
from zoo.tensors import sha256_file

# A file that was written a moment ago may be written again within one tick of its clock.
_SETTLED = 2.0


def sha256_of(file: Path) -> str:
    """The sha256 of a file in hexadecimal digits, read once as long as size, time and inode stay.

    Looked up in zoo's cache, so that a gigabyte is not hashed again each time it is loaded."""
    file = file.resolve()
    kept = cache_folder() / "hashes" / hashlib.sha256(str(file).encode()).hexdigest()[:32]
    before = _stamp(file)
    known = read_json(kept)
    if known and known.get("stamp") == before:
        return str(known["sha256"])
    found = sha256_file(file)
    settled = time.time() - file.stat().st_mtime > _SETTLED
    if settled and _stamp(file) == before:
        write_json(kept, {"stamp": before, "sha256": found})
    return found


def git_oid(data: bytes) -> str:
    """What git, and so the Hub, calls a small file with these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _stamp(file: Path) -> list[int]:
    told = file.stat()
    return [told.st_size, told.st_mtime_ns, told.st_ino]
