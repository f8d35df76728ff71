"""Xet through a content-addressed store in a local folder, which the stock hf-xet reads and writes
by itself. The Hub only hands out its address, and reads in its shards which files it has."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_RECORD = 48  # bytes, of everything in the section of a shard that tells of files
_VERIFIED, _DESCRIBED = 1 << 31, 1 << 30
_END = b"\xff" * 32


@dataclass(frozen=True)
class XetFile:
    hash: str
    sha256: str
    size: int


def files_in(folder: Path) -> dict[str, XetFile]:
    """sha256 → file, of everything that the store in this folder holds."""
    return {file.sha256: file for shard in folder.rglob("shards/*.mdb")
            for file in _files(shard.read_bytes())}


def _files(shard: bytes) -> Iterator[XetFile]:
    place = _RECORD
    while shard[place:place + 32] != _END:
        name, (flags, count) = shard[place:place + 32], struct.unpack_from("<II", shard, place + 32)
        parts = range(place + _RECORD, place + _RECORD * (1 + count), _RECORD)
        size = sum(struct.unpack_from("<I", shard, part + 36)[0] for part in parts)
        place += _RECORD * (1 + count * (2 if flags & _VERIFIED else 1))
        if flags & _DESCRIBED:
            yield XetFile(_hex(name), _hex(shard[place:place + 32]), size)
            place += _RECORD


def _hex(stored: bytes) -> str:
    """Hashes are stored as four numbers, each with its lowest byte first."""
    return b"".join(stored[at:at + 8][::-1] for at in range(0, 32, 8)).hex()
