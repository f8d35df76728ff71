"""Tensors in the cache folder: kept under a name, found again mapped.

A cache is never a reason to fail: what cannot be written is not kept, what cannot be read or is
damaged was not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from zoo.cache.kept import SUFFIX, kept_folder, make_room, touch
from zoo.errors import FormatError
from zoo.tensors.digest import digest
from zoo.tensors.reading import open_tensors
from zoo.tensors.writing import save_tensors

_KEY = "of all images"
_HASH = "sha256 of the tensor"
_HEADER_BYTES = 4096


def keep(name: str, tensor: Tensor, about: Mapping[str, str]) -> bool:
    """Write a tensor to the cache folder, where others make room for it. name: letters and digits.
    about: what `zoo cache` says of it. False when it is not kept: too large for the limit, or the
    folder cannot be written, or the disk is full."""
    file = kept_folder() / (name + SUFFIX)
    try:
        if not make_room(tensor.nbytes + _HEADER_BYTES):
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({_KEY: tensor}, file, metadata={**about, _HASH: digest({_KEY: tensor})})
    except OSError:
        return False
    return True


def kept(name: str) -> Tensor | None:
    """The tensor of this name, mapped; None where there is none. All of it is read once and
    compared with the hash that was written beside it; a file that differs is deleted."""
    file = kept_folder() / (name + SUFFIX)
    if not file.is_file():
        return None
    try:
        stored = open_tensors(file)
        tensor = stored[_KEY]
        whole = stored.metadata.get(_HASH) == digest({_KEY: tensor})
    except (FormatError, OSError, KeyError, ValueError):
        whole = False
    if not whole:
        with suppress(OSError):
            file.unlink()
        return None
    touch(file)
    return tensor
