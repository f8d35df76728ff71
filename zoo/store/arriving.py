"""Hashes of large files, taken while the Hub's client writes them.

The client has no hook for the bytes that come in, and to read a gigabyte again when it is there
takes as long as half of a fast download. So a thread reads along in the file that is being written.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

# Each read and each hash hands Python's lock to and fro with the client's threads, which costs a
# busy machine more than the hash does: seldom, then, and much at once.
_EVERY = 0.05  # seconds
_PIECE = 4 << 20


class Arrived:
    """What arrived: the sha256 of a file that nobody has written to since."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[int, int, int], str] = {}

    def keep(self, file: FileIO, sha256: str) -> None:
        self._hashes[_stamp(os.fstat(file.fileno()))] = sha256

    def sha256_of(self, file: Path) -> str | None:
        """None where it is not known. It may be wrong where a download began anew in between; one
        that is not what is expected has to be looked at again, in the file."""
        return self._hashes.get(_stamp(file.stat()))


@contextmanager
def hashed_on_arrival(folder: Path) -> Iterator[Arrived]:
    """Hash what is written to `*.incomplete` files in this folder, which the client then renames,
    for as long as the block lasts."""
    arrived = Arrived()
    if os.name != "posix":  # elsewhere an open file cannot be renamed
        yield arrived
        return
    stop = threading.Event()
    reader = threading.Thread(target=_read_along, args=(folder, arrived, stop), daemon=True)
    reader.start()
    try:
        yield arrived
    finally:
        stop.set()
        reader.join()


def _read_along(folder: Path, arrived: Arrived, stop: threading.Event) -> None:
    opened: dict[str, tuple[FileIO, hashlib._Hash]] = {}
    piece = memoryview(bytearray(_PIECE))
    try:
        while True:
            last = stop.is_set()  # asked before the files are read: then they are whole
            for name in _incomplete(folder) - opened.keys():
                with suppress(OSError):  # renamed in between
                    opened[name] = FileIO(folder / name), hashlib.sha256()
            for file, hash_ in opened.values():
                while size := file.readinto(piece):
                    hash_.update(piece[:size])
            if last:
                break
            stop.wait(_EVERY)
        for file, hash_ in opened.values():
            arrived.keep(file, hash_.hexdigest())
    except OSError:
        pass  # what is not known is read once it is there
    finally:
        for file, _ in opened.values():
            file.close()


def _incomplete(folder: Path) -> set[str]:
    try:
        return {file.name for file in folder.iterdir() if file.suffix == ".incomplete"}
    except OSError:  # not there yet
        return set()


def _stamp(told: os.stat_result) -> tuple[int, int, int]:
    return told.st_ino, told.st_size, told.st_mtime_ns
