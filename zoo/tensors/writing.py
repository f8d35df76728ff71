"""Write tensors: header first, every byte once, hashed on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from zoo.atomic import atomic_file
from zoo.errors import DiskFull, FormatError, OptionError
from zoo.tensors.header import ALIGNMENT, DTYPE_NAMES, MAX_HEADER_BYTES, TensorInfo, encode_header


def save_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> dict[str, str]:
    """Write a safetensors file, or shards and their index; the same input gives the same bytes.

    Each file appears whole or not at all; `atomic_folder` does that for several. Tensors that
    are the same memory are stored once, and the metadata says which name stands for which, as
    Hugging Face's libraries do. Whole cache lines come first, then large items, then names in
    order.

    tensors: any device, contiguous or not. path: ends in `.safetensors`; shards are called
    `NAME-00001-of-00002.safetensors` and the index `NAME.safetensors.index.json`.
    metadata: text to store; `{"format": "pt"}` is always there. max_shard_bytes: at least 1; a
    tensor that is larger has a shard of its own.
    Returns {file name: sha256 in hexadecimal digits}.
    Raises FormatError for what safetensors cannot hold, OSError (ENOSPC) when the disk is too
    full, before anything is written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise FormatError(path, "the name of a safetensors file ends in '.safetensors'")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise OptionError("save_tensors", f"max_shard_bytes is {max_shard_bytes}, expected 1…")
    text = {**(metadata or {}), "format": "pt"}
    _check(path, tensors, text)
    aliases = _aliases(tensors, text)
    kept = {key: tensor for key, tensor in tensors.items() if key not in aliases}
    _check_space(path, sum(tensor.nbytes for tensor in kept.values()))
    shards = _split(path, kept, max_shard_bytes)
    if len(shards) == 1:
        return {path.name: _write(path, shards[path.name], text | aliases)}
    hashes = {
        name: _write(path.with_name(name), shard, {"format": "pt"})
        for name, shard in shards.items()
    }
    return hashes | _write_index(path, shards, text | aliases)


@contextmanager
def laid_out(
    like: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    aliases: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
) -> Iterator[Callable[[str, int, Tensor], None]]:
    """A safetensors file, or shards, whose tensors are filled in piece by piece, in any order and
    from any thread: `put(key, start, part)` writes elements start… of a flattened tensor.

    The room on the disk is taken first. The files are under their names from the beginning: use
    it inside `atomic_folder`, or on a temporary name. like: shapes and dtypes, as tensors without
    values. aliases: tied name → the key in `like` that it stands for. Otherwise as `save_tensors`.
    """
    path = Path(path)
    text = {**(metadata or {}), "format": "pt", **(aliases or {})}
    shards = _split(path, like, max_shard_bytes)
    place: dict[str, tuple[int, int]] = {}
    with ExitStack() as files:
        for name, shard in shards.items():
            header, infos = _header(path, shard, text if len(shards) == 1 else {"format": "pt"})
            file = files.enter_context(path.with_name(name).open("xb"))
            size = len(header) + sum(tensor.nbytes for tensor in shard.values())
            _reserve(path, file.fileno(), size)
            os.pwrite(file.fileno(), header, 0)
            for key, info in infos.items():
                place[key] = file.fileno(), len(header) + info.start

        def put(key: str, start: int, part: Tensor) -> None:
            descriptor, offset = place[key]
            data = part.contiguous().view(-1).view(torch.uint8).numpy().data
            offset += start * part.itemsize
            while data:
                written = os.pwrite(descriptor, data, offset)
                data, offset = data[written:], offset + written

        yield put
        if len(shards) > 1:
            _write_index(path, shards, text)


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    for key, tensor in tensors.items():
        if not isinstance(key, str) or key == "__metadata__" or not _is_text(key):
            raise FormatError(path, f"a tensor is named {key!r}, expected other text")
        if not isinstance(tensor, Tensor):
            raise FormatError(path, f"{key!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.is_meta:
            raise FormatError(path, f"tensor {key!r} is on the meta device and has no values")
        if tensor.layout != torch.strided:
            raise FormatError(path, f"tensor {key!r} is {tensor.layout}; call .to_dense() on it")
        if tensor.dtype not in DTYPE_NAMES:
            raise FormatError(path, f"safetensors has no {tensor.dtype}, the dtype of {key!r}")
    for key, value in metadata.items():
        if not _is_text(key) or not _is_text(value):
            raise FormatError(path, f"metadata {key!r} is {value!r}; both must be text")
        if value in tensors and key != "format":
            raise FormatError(
                path, f"metadata {key!r} is {value!r}, a tensor's name, and would read as a tie"
            )


def _is_text(value: object) -> bool:
    """Whether UTF-8 can hold it: half a surrogate pair is a str and no text."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _aliases(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Names whose tensor is the same memory, read the same way, as that of an earlier name."""
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    for key in sorted(tensors):
        t = tensors[key]
        memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_conj(), t.is_neg())
        kept = first.setdefault(memory, key) if t.nbytes else key
        if kept != key and key not in metadata:
            aliases[key] = kept
    return aliases


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise DiskFull(path, needed, free)


def _reserve(path: Path, descriptor: int, size: int) -> None:
    """Take the room on the disk, where the file system can; find out that there is none."""
    _check_space(path, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DiskFull(path, size, shutil.disk_usage(path.parent).free) from None


def _place(tensor: Tensor, key: str) -> tuple[bool, int, str]:
    """What a tensor is sorted by: those whose bytes are whole lines of the cache first, so that
    they are aligned in the mapped file, then large items, then names."""
    return tensor.nbytes % ALIGNMENT != 0, -tensor.itemsize, key


def _split(
    path: Path, tensors: Mapping[str, Tensor], max_bytes: int | None
) -> dict[str, dict[str, Tensor]]:
    """File name → its tensors in the order in which they are stored, cut where a shard would grow
    too large."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key in sorted(tensors, key=lambda key: _place(tensors[key], key)):
        if max_bytes is not None and shards[-1] and size + tensors[key].nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensors[key]
        size += tensors[key].nbytes
    if len(shards) == 1:
        return {path.name: shards[0]}
    return {f"{path.stem}-{number:05d}-of-{len(shards):05d}{path.suffix}": shard
            for number, shard in enumerate(shards, 1)}


def _write_index(
    path: Path, shards: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write the index of the shards; its name and its hash."""
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard.values())
    index = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": {key: name for name, shard in shards.items() for key in shard},
    }
    encoded = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    index_path = path.with_name(path.name + ".index.json")
    with atomic_file(index_path) as file:
        file.write(encoded)
    return {index_path.name: hashlib.sha256(encoded).hexdigest()}


def _header(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """The header of a file with these tensors in this order, and where their bytes lie after it."""
    infos: dict[str, TensorInfo] = {}
    stop = 0
    for key, tensor in tensors.items():
        start, stop = stop, stop + tensor.nbytes
        infos[key] = TensorInfo(tensor.dtype, tuple(tensor.shape), start, stop)
    header = encode_header(infos, metadata)
    if len(header) > MAX_HEADER_BYTES:
        raise FormatError(
            path,
            f"names, shapes and metadata take {len(header):,} bytes, "
            f"more than {MAX_HEADER_BYTES:,}",
        )
    return header, infos


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    header, _ = _header(path, tensors, metadata)
    digest = hashlib.sha256(header)
    # The hash runs beside the write and the sync.
    with ThreadPoolExecutor(1) as hasher, atomic_file(path) as file:
        file.write(header)
        for tensor in tensors.values():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            data = plain.view(-1).view(torch.uint8).numpy().data
            hashed = hasher.submit(digest.update, data)
            file.write(data)
            if plain.data_ptr() != tensor.data_ptr():
                hashed.result()  # so that copies do not pile up
    return digest.hexdigest()
