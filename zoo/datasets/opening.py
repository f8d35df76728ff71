"""From what the user writes to ImageData."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset

from zoo.datasets.files import read_folder
from zoo.datasets.images import ImageData
from zoo.datasets.manifest import read_csv
from zoo.datasets.wrapped import open_with_timm, wrap
from zoo.errors import DataError, UnknownName
from zoo.names import DATA_SCHEMES, Address, Name, parse, suggest
from zoo.specs import DatasetSpec

Role = Literal["train", "test"]
_TABLES = (".csv", ".tsv")


def load_data(
    data: ImageData | Dataset[Any] | str | os.PathLike[str],
    *,
    split: str | None = None,
    role: Role = "train",
    image_size: int | None = None,
    labelled: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Open data by name, path or address, or take over a torch `Dataset`; an ImageData is itself.

    data: `digits`, `acme/leaves`, `train.csv`, `photos/`, `photos.tar`, `folder:`, `csv:`,
    `hfds:`, `wds:` or `torch:` and where it lies, or an object. split: one of the data's own names;
    without it, `role` picks the first of a registered set's splits for "train" and the last for
    "test". image_size: the shorter side after resizing, and the side of the centre crop; images
    that are in memory and smaller stay as they are. labelled: False leaves labels unread.
    limit: at most so many images, drawn with `seed` with the same share of every class.

    Raises DataError, naming file and row where there are some; UnknownName, BadName.
    """
    if isinstance(data, ImageData):
        loaded = data
    elif isinstance(data, Dataset):
        _refuse_split(split, f"a {type(data).__name__}")
        loaded = wrap(data, image_size=image_size, labelled=labelled)
    elif isinstance(data, str | os.PathLike):
        loaded = _open(data, split, role, image_size, labelled)
    else:
        hint = ": give its .dataset" if isinstance(data, DataLoader) else ""
        raise DataError(f"data is a {type(data).__name__}, expected a name, a path, an address or "
                        f"a torch Dataset{hint}")
    if not labelled:
        loaded = loaded.without_labels()
    elif loaded.labels is None:
        raise DataError("these data have no labels, and labels are needed here")
    return loaded if limit is None else loaded.take(limit, seed)


def _open(
    given: str | os.PathLike[str], split: str | None, role: Role, size: int | None, labelled: bool
) -> ImageData:
    reference = _meant(given)
    if isinstance(reference, Name):
        return _open_registered(reference, split, role, size, labelled)
    if isinstance(reference, Address):
        return _open_address(reference, split, role, size, labelled)
    return _open_path(reference.expanduser(), split, role, size, labelled)


def public_name(data: object) -> str:
    """What others may call the data: a registered name, or an address on the Hub; "" of anything
    else, whose name says more of this machine than of the data."""
    meant = _meant(data) if isinstance(data, str) else None
    if isinstance(meant, Name):
        return str(meant if meant.namespace else Name("zoo", meant.local))
    on_the_hub = isinstance(meant, Address) and meant.scheme == "hfds" and \
        re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", meant.location)
    return str(meant) if on_the_hub else ""


def _meant(given: str | os.PathLike[str]) -> Path | Name | Address:
    path = Path(given)
    scheme, colon, _ = os.fspath(given).partition(":")
    table = path.suffix.lower() in _TABLES and not (colon and scheme in DATA_SCHEMES)
    return path if given and (table or path.exists()) else parse(given)


def _open_path(
    path: Path, split: str | None, role: Role, size: int | None, labelled: bool
) -> ImageData:
    if not path.exists():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = suggest(path.name, [entry.name for entry in beside], n=1)
        raise DataError("there is no such file or folder"
                        + (f"; did you mean {near[0]!r}?" if near else ""), file=path)
    if path.is_dir():
        return read_folder(path, split=split, role=role, image_size=size, labelled=labelled)
    _refuse_split(split, f"{path}")
    if path.suffix.lower() in _TABLES:
        return read_csv(path, image_size=size, labelled=labelled)
    if path.suffix == ".tar":
        return open_with_timm("tar", str(path), split=split, role=role, image_size=size,
                              labelled=labelled)
    raise DataError("expected a folder, or a file that ends in .csv, .tsv or .tar", file=path)


def _open_address(
    address: Address, split: str | None, role: Role, size: int | None, labelled: bool
) -> ImageData:
    path = Path(address.location).expanduser()
    if address.scheme == "csv" and path.is_file():
        _refuse_split(split, f"{path}")
        return read_csv(path, image_size=size, labelled=labelled)
    if address.scheme in ("csv", "folder"):
        return _open_path(path, split, role, size, labelled)
    if address.scheme in ("hfds", "wds", "torch"):
        return open_with_timm(address.scheme, address.location, split=split, role=role,
                              image_size=size, labelled=labelled)
    raise DataError(f"'{address}' is the address of a model; data have 'folder:', 'csv:', 'hfds:', "
                    "'wds:' or 'torch:'")


def _open_registered(
    name: Name, split: str | None, role: Role, size: int | None, labelled: bool
) -> ImageData:
    from zoo import registry

    try:
        spec = registry.find(str(name), DatasetSpec)
    except UnknownName as error:
        hint = "there is no file or folder of this name either"
        raise UnknownName(error.given, error.kind, error.suggestions,
                          f"{error.hint}; {hint}" if error.hint else hint) from None
    chosen = split or spec.splits[0 if role == "train" else -1]
    if chosen not in spec.splits:
        near = suggest(chosen, spec.splits, n=1)
        raise DataError(f"{spec.name} has no split {chosen!r}; its splits are "
                        + ", ".join(spec.splits)
                        + (f"; did you mean {near[0]!r}?" if near else ""))
    built = registry.load(spec)(split=chosen)
    if isinstance(built, ImageData):
        return built.shrunk(size)
    return wrap(built, image_size=size, labelled=labelled)


def _refuse_split(split: str | None, owner: str) -> None:
    if split is not None:
        raise DataError(f"split={split!r} was asked for, and {owner} has no splits")
