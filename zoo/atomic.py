"""Replace a file or a folder so that a reader, and a kill at any point, find the old one or the
new one, whole.

What is being written has the hidden name `.NAME.HOST.PID.RANDOM.tmp` beside its target. The next
writer of the same target deletes those whose process on this host is gone.

Where the system cannot exchange two folders in one step, the old folder is renamed to
`.NAME.old`, the new one takes its place, and then the old one is deleted: a reader that finds no
folder `NAME` takes `.NAME.old` (`current_folder`), and the next writer moves it back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zoo.errors import FormatError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that becomes `path`, on disk, when the block ends without an error."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A free name for a file that becomes `path`, on disk, when the block ends without an error."""
    path = Path(path)
    _delete_leftovers(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], may_replace: Callable[[Path], bool]
) -> Iterator[Path]:
    """An empty folder to fill that becomes `path`, on disk, when the block ends without an error.

    path: need not exist; what lies in it is deleted when the new folder stands in its place.
    may_replace: is asked about a folder that is not empty.
    Raises FormatError when `path` is a file or may not be replaced.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    _settle(path)
    if path.exists() and not path.is_dir():
        raise FormatError(path, "is a file; choose another name for the folder")
    if not _is_free(path) and not may_replace(path):
        raise FormatError(
            path, "is a folder with other things in it; empty it or choose another one"
        )
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _swap(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def folder_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder beside `path` for what is only needed on the way to it; deleted at the end,
    and after a kill by the next writer of `path`."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_leftovers(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leads_outside(file: Path) -> bool:
    """Whether it is a link to something that lies elsewhere than its folder: to copy or publish
    that would give away what nobody meant. The Hub's cache keeps its files in `../../blobs`."""
    folder, target = file.parent.resolve(), file.resolve()
    cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
    return file.is_symlink() and not cached and not target.is_relative_to(folder)


def current_folder(path: Path) -> Path:
    """`path`, or where the folder lies while its replacement was cut short."""
    aside = _aside(path.resolve())
    return aside if aside.is_dir() and not path.exists() else path


def _swap(new: Path, path: Path) -> None:
    if _is_free(path):
        new.rename(path)
    elif not _exchange(new, path):
        aside = _aside(path)
        path.rename(aside)
        new.rename(path)
        aside.rename(new)  # a half-deleted folder must not have the name that readers fall back on


def _exchange(one: Path, other: Path) -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if not libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # not on this file system
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _settle(path: Path) -> None:
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(path)


def delete_leftovers(folder: Path, stale_seconds: float) -> None:
    """Delete files that were being written in a folder, whatever they were to become, by processes
    of this host that are gone, or so long ago that any process is."""
    before = time.time() - stale_seconds
    host = re.escape(socket.gethostname())
    for leftover in folder.glob(".*.tmp"):
        match = re.fullmatch(rf".*\.{host}\.(\d+)\.[0-9a-f]{{8}}\.tmp", leftover.name)
        with suppress(OSError):
            if leftover.stat().st_mtime < before or (match and not _is_running(int(match[1]))):
                leftover.unlink()


def _delete_leftovers(path: Path) -> None:
    host = re.escape(socket.gethostname())
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{host}\.(\d+)\.[0-9a-f]{{8}}\.tmp")
    for leftover in path.parent.iterdir():
        match = pattern.fullmatch(leftover.name)
        if match and not _is_running(int(match[1])):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _temporary(path: Path) -> Path:
    unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{unique}.tmp")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _is_free(path: Path) -> bool:
    return not path.exists() or not any(path.iterdir())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
