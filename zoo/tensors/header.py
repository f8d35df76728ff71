"""The header of a safetensors file: eight bytes of length, little-endian, then a JSON object
that says for every tensor its dtype, its shape and where in the rest of the file its bytes lie.
Format: https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from zoo.errors import FormatError

MAX_HEADER_BYTES = 25_000_000

DTYPES: Mapping[str, torch.dtype] = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "BOOL": "bool",
        "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
        "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
        "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
        "F8_E4M3": "float8_e4m3fn", "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
        "C64": "complex64",
    }.items()
    if hasattr(torch, dtype)
}  # fmt: skip
# Mapped tensors that start on a line of the cache answer bit for bit as in memory.
ALIGNMENT = 64
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file. start, stop: its bytes, counted from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a file, in the order of their bytes, and its metadata.

    Everything is checked before anything is allocated: the tensors fill the rest of the file
    without a hole or an overlap. Raises FormatError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise FormatError(path, f"is not a safetensors file: {size} bytes are too few")
        if length > MAX_HEADER_BYTES and _is_pickle(length.to_bytes(8, "little")):
            raise FormatError(
                path,
                "is not a safetensors file, but a pickle under another name, which can run any "
                "program when it is read; `zoo convert` reads the tensors of one, if you trust it",
            )
        if length > MAX_HEADER_BYTES:
            raise FormatError(
                path,
                f"is not a safetensors file, or not a safe one: it announces a header of "
                f"{length:,} bytes, more than {MAX_HEADER_BYTES:,}",
            )
        if 8 + length > size:
            raise FormatError(
                path, f"is cut off: its header needs {8 + length} bytes, the file has {size}"
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise FormatError(path, "is not a safetensors file: its header does not start with '{'")
    fields = parse_object(path, text)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(path, "its __metadata__ is not a mapping of strings to strings")
    infos = {key: _info(path, key, field, 8 + length, size) for key, field in fields.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 8 + length
    for key, info in infos.items():
        if info.start != end:
            problem = "a hole lies before it" if info.start > end else "it overlaps another one"
            raise FormatError(
                path, f"tensor {key!r} starts at byte {info.start}, expected {end}: {problem}"
            )
        end = info.stop
    if end != size:
        raise FormatError(path, f"{size - end} bytes follow the last tensor")
    return infos, metadata


def _is_pickle(beginning: bytes) -> bool:
    """Whether a pickle begins so, or a zip file, which is what torch puts one into."""
    return beginning.startswith(b"PK\3\4") or (beginning[0] == 0x80 and 2 <= beginning[1] <= 5)


def encode_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header's bytes, padded with spaces to a multiple of 8.

    infos: start and stop count from the end of the header, which is not known before.
    """
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    for key, info in infos.items():
        fields[key] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (info.start, info.stop),
        }
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def parse_object(path: Path, text: bytes) -> dict[str, object]:
    """Text that came from a file, read as a JSON object in which no key stands twice."""
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(path, f"holds no valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise FormatError(path, f"holds a JSON {type(fields).__name__}, expected an object")
    return fields


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        key.encode()  # half a surrogate pair is valid JSON and no text
        if key in fields:
            raise ValueError(f"the key {key!r} stands twice")
        fields[key] = value
    return fields


def _info(path: Path, key: str, field: object, begin: int, size: int) -> TensorInfo:
    entry = field if isinstance(field, dict) else {}
    name, shape, offsets = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
    if not isinstance(name, str) or name not in DTYPES:
        raise FormatError(
            path, f"tensor {key!r} has dtype {name!r}, expected one of {', '.join(DTYPES)}"
        )
    # An empty tensor may announce dimensions whose strides no int64 holds.
    if not _are_counts(shape) or math.prod(n or 1 for n in shape) >= 2**60:
        raise FormatError(path, f"tensor {key!r} has shape {shape!r}, expected a list of counts")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(
            path, f"tensor {key!r} has data_offsets {offsets!r}, expected [start, stop]"
        )
    start, stop = offsets[0] + begin, offsets[1] + begin
    if stop > size:
        raise FormatError(
            path, f"is cut off: tensor {key!r} ends at byte {stop}, the file has {size}"
        )
    needed = math.prod(shape) * DTYPES[name].itemsize
    if needed != stop - start:
        raise FormatError(
            path, f"tensor {key!r} is {name} {shape} and needs {needed} bytes, not {stop - start}"
        )
    return TensorInfo(DTYPES[name], tuple(shape), start, stop)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether it is a short list of sizes; torch knows no tensor of more than 64 dimensions."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )
