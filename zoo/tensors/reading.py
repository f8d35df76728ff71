"""Read tensors: `model.safetensors`, an index of shards, or a folder that has one of them."""

from __future__ import annotations

import mmap
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from zoo.atomic import current_folder
from zoo.errors import FormatError
from zoo.tensors.header import MAX_HEADER_BYTES, TensorInfo, parse_object, read_header

WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

_SHARD = re.compile(r"[^/\\:\0]+\.safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name, mapped from their files when they are asked for.

    They cost no memory until they are read, and writing to one copies the pages it touches: the
    files never change. A tensor that begins at a multiple of its item size is a view, any other
    is a copy. Names that were saved as tied to another one are found under both.

    files: where the tensors lie. metadata: the text stored with them. aliases: tied name → the
    name under which the tensor is stored.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        infos: Mapping[str, tuple[TensorInfo, mmap.mmap]],
        metadata: Mapping[str, str],
    ) -> None:
        self.files = files
        self.aliases = {
            name: kept
            for name, kept in metadata.items()
            if kept in infos and name not in infos and name != "format"
        }
        self.metadata = {key: text for key, text in metadata.items() if key not in self.aliases}
        self._infos = infos
        self._views: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        tensor = self._views.get(key)
        if tensor is None:
            tensor = self.slice(key).view(self.shape(key))
            info, _ = self._find(key)
            if info.start % info.dtype.itemsize == 0:  # no copy, which would cost memory
                self._views[key] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._infos
        yield from self.aliases

    def __len__(self) -> int:
        return len(self._infos) + len(self.aliases)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._find(key)[0].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._find(key)[0].dtype

    def slice(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements start…stop of the flattened tensor, as one dimension; by default all.

        Raises IndexError when they are not in the tensor.
        """
        info, data = self._find(key)
        itemsize = info.dtype.itemsize
        count = (info.stop - info.start) // itemsize
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise IndexError(f"elements {start}…{stop} of {key!r}, which has {count}")
        if start == stop:
            return torch.empty(0, dtype=info.dtype)
        offset = info.start + start * itemsize
        flat = torch.frombuffer(data, dtype=info.dtype, count=stop - start, offset=offset)
        return flat.clone() if offset % itemsize else flat  # (stop - start,)

    def _find(self, key: str) -> tuple[TensorInfo, mmap.mmap]:
        return self._infos[self.aliases.get(key, key)]


def open_tensors(path: str | os.PathLike[str]) -> StoredTensors:
    """Check the headers and map the files.

    path: a safetensors file, an index (`*.safetensors.index.json`) whose shards lie beside it,
    or a folder that has `model.safetensors` or its index.
    Raises FormatError when something is missing, damaged, or a pickle.
    """
    path = current_folder(Path(path))
    if path.is_dir():
        path = _weights_in(path)
    if path.suffix in PICKLES:
        raise pickled(path)
    if not path.is_file():
        raise FormatError(path, "there is no such file or folder")
    return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors by name, mapped; tied names share one tensor. Arguments: see `open_tensors`."""
    stored = open_tensors(path)
    tensors = {key: stored[key] for key in stored if key not in stored.aliases}
    return tensors | {name: tensors[kept] for name, kept in stored.aliases.items()}


def pickled(path: Path) -> FormatError:
    """What is said of a pickle, wherever one turns up."""
    return FormatError(
        path,
        "is a pickle, and reading a pickle can run any program; none is ever loaded. "
        f"`zoo convert {shlex.quote(str(path))} -o model.safetensors` reads its tensors, with "
        "torch's weights_only=True, and nothing else of it",
    )


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise FormatError(folder, f"has both {WEIGHTS} and {INDEX}; name the one you mean")
    others = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if others:
        raise pickled(others[0])
    raise FormatError(folder, f"has neither {WEIGHTS} nor {INDEX}")


def _open_file(path: Path) -> StoredTensors:
    infos, metadata = read_header(path)
    data = _map(path)
    return StoredTensors((path,), {key: (info, data) for key, info in infos.items()}, metadata)


def _open_shards(index: Path) -> StoredTensors:
    shard_of, metadata = _read_index(index)
    files = tuple(index.parent / name for name in sorted(set(shard_of.values())))
    infos: dict[str, tuple[TensorInfo, mmap.mmap]] = {}
    for file in files:
        expected = {key for key, shard in shard_of.items() if shard == file.name}
        if not file.is_file():
            raise FormatError(index, f"needs {file.name} for {min(expected)!r}; it is missing")
        shard, _ = read_header(file)
        for key in sorted(expected ^ shard.keys()):
            where = "is not in it" if key in expected else "is in it and not in the index"
            raise FormatError(file, f"does not fit {index.name}: tensor {key!r} {where}")
        data = _map(file)
        infos |= {key: (info, data) for key, info in shard.items()}
    return StoredTensors(files, infos, metadata)


def _read_index(index: Path) -> tuple[dict[str, str], dict[str, str]]:
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise FormatError(index, f"is larger than {MAX_HEADER_BYTES:,} bytes; that is no index")
    fields = parse_object(index, index.read_bytes())
    shard_of, metadata = fields.get("weight_map"), fields.get("metadata", {})
    if not isinstance(shard_of, dict) or not isinstance(metadata, dict):
        raise FormatError(index, "has no weight_map, or its metadata is not an object")
    for key, name in shard_of.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise FormatError(
                index,
                f"puts tensor {key!r} into {name!r}, expected the name of a "
                "safetensors file in the same folder",
            )
    return shard_of, {key: value for key, value in metadata.items() if isinstance(value, str)}


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # The same without a reservation, which would refuse a file larger than the memory.
        # Python has no name for the flag before 3.13.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE)
