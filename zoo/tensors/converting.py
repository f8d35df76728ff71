"""A pickle of weights as safetensors: on request, and through torch's reader that runs no code."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import FormatError, OptionError
from zoo.tensors.reading import load_tensors
from zoo.tensors.writing import save_tensors

# Under which keys training programs put the weights.
_USUAL = ("state_dict", "model_state_dict", "model", "module", "net", "weights", "params",
          "ema", "model_ema", "state_dict_ema", "params_ema", "ema_state_dict")
_DEEPEST = 3


@dataclass(frozen=True)
class Converted:
    """What became of a pickle. key: under which the weights lay, "" for the whole. tied: names that
    share another one's tensor. dropped: names of what was no tensor."""

    out: Path
    key: str
    tensors: int
    size: int
    tied: tuple[str, ...]
    dropped: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out)}


def convert_pickle(
    file: str | os.PathLike[str], out: str | os.PathLike[str], *, key: str | None = None
) -> Converted:
    """Write the tensors of a pickle (`.pth`, `.pt`, `.bin`, `.ckpt`) as safetensors.

    It is read by `torch.load(…, weights_only=True)`, which knows tensors and plain containers and
    refuses everything else. Tensors that are the same memory are stored once under all their names;
    whatever is no tensor is left out.

    out: ends in `.safetensors`. key: under which the weights lie, `"model_ema"` or
    `"checkpoint.state_dict"`; by default the one place where there are any.
    Raises FormatError with the reason for what is refused or damaged, OptionError for a key that is
    missing, or needed.
    """
    file, out = Path(file).expanduser(), Path(out).expanduser()
    if not file.is_file():
        raise FormatError(file, "is a folder; name one of its files" if file.is_dir()
                          else "there is no such file")
    if out.suffix != ".safetensors":
        raise FormatError(out, "the name of a safetensors file ends in '.safetensors'")
    found = _mapping(_read(file))
    if found is None:
        raise FormatError(file, "holds no mapping of names to tensors")
    where, state = _at(file, found, key) if key is not None else _only(file, found)
    tensors = {name: value.detach() for name, value in state.items()
               if isinstance(name, str) and isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        _want_real(file, name, tensor)
    dropped = tuple(sorted(str(name) for name in state if name not in tensors))
    save_tensors(tensors, out)
    kept = {tensor.data_ptr(): name for name, tensor in reversed(load_tensors(out).items())
            if tensor.nbytes}
    tied = tuple(sorted(name for name, tensor in load_tensors(out).items()
                        if tensor.nbytes and kept.get(tensor.data_ptr()) != name))
    return Converted(out, where, len(tensors), out.stat().st_size, tied, dropped)


def _read(file: Path) -> object:
    _want_plain_zip(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes do to a reader
        problem = _reason(error)
    raise FormatError(file, f"is refused: {problem}. What needs more than tensors and plain "
                      "containers can be converted only by a program that you trust with it")


def _reason(error: Exception) -> str:
    """The reader's own reason, without its advice on how to switch the check off."""
    text = " ".join(str(error).split())
    asked = re.search(r"(?:Unsupported global: GLOBAL|GLOBAL) ([\w.]+)", text)
    if asked:
        return f"it asks for {asked[1]}, and may run any program with it"
    refused = re.search(r"WeightsUnpickler error: (.*?)(?:\. |$| Check the documentation)", text)
    if refused:
        return f"{refused[1][:200]} (it is no pickle of plain tensors)"
    return f"{type(error).__name__}: {re.split(r'[.;] ', text)[0][:200]}"


def _want_plain_zip(file: Path) -> None:
    """Raises FormatError for an archive that grows when it is unpacked: torch's never do."""
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise FormatError(file, f"is damaged: {error}") from None
    size = file.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(
            entry.file_size for entry in entries) > size:
        raise FormatError(file, "is refused: it is compressed, or says that it unpacks to more "
                          f"than its {size:,} bytes, which torch.save never writes")


def _want_real(file: Path, name: str, tensor: Tensor) -> None:
    """Raises FormatError for a tensor that is larger than what is stored of it."""
    if tensor.layout == torch.strided and not tensor.is_meta \
            and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise FormatError(file, f"is refused: tensor {name!r} is {list(tensor.shape)} and takes "
                          f"{tensor.nbytes:,} bytes, and the file has "
                          f"{tensor.untyped_storage().nbytes():,} of it")


def _mapping(value: object) -> Mapping[Any, Any] | None:
    return value if isinstance(value, Mapping) else None


def _at(file: Path, found: Mapping[Any, Any], key: str) -> tuple[str, Mapping[Any, Any]]:
    places = dict(_nested(found))
    if key not in places:
        raise OptionError("convert", f"{file.name} has no tensors under {key!r}; {_places(found)}")
    return key, places[key]


def _only(file: Path, found: Mapping[Any, Any]) -> tuple[str, Mapping[Any, Any]]:
    """The one place where weights lie; that of a usual name before any other."""
    if _has_tensors(found):
        return "", found
    places = dict(_nested(found))
    usual = {name: state for name, state in places.items()
             if name.rpartition(".")[2] in _USUAL}
    candidates = usual or places
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    if not candidates:
        raise FormatError(file, "has no tensors with names in it")
    raise OptionError("convert", f"{file.name} has weights in several places; {_places(found)}")


def _places(found: Mapping[Any, Any]) -> str:
    names = list(dict(_nested(found)))
    return f"say which with --key: {', '.join(names)}" if names else "leave the key out"


def _nested(found: Mapping[Any, Any], above: str = "", depth: int = 1) -> Iterator[
        tuple[str, Mapping[Any, Any]]]:
    for name, value in found.items():
        inner = _mapping(value)
        if inner is None or not isinstance(name, str):
            continue
        if _has_tensors(inner):
            yield f"{above}{name}", inner
        elif depth < _DEEPEST:
            yield from _nested(inner, f"{above}{name}.", depth + 1)


def _has_tensors(found: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for name, value in found.items()
               if isinstance(name, str))
