"""Image files: lists of paths, and folders with one sub-folder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from zoo.datasets.fitting import fit_picture
from zoo.datasets.images import ImageData, shortened
from zoo.errors import DataError
from zoo.names import natural, suggest

_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class Files:
    """A Source of image files. manifest, rows: where they were listed, for the errors."""

    def __init__(
        self,
        paths: Sequence[str],
        size: int | None,
        manifest: Path | None = None,
        rows: Sequence[int] = (),
    ) -> None:
        self.paths, self.size = paths, size
        self.manifest, self.rows = manifest, rows

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                return fit_picture(picture, self.size)  # (3, H, W)
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            reason = f"{error}".replace(f" {path!r}", "")
            if self.manifest is None:
                raise DataError(f"the image cannot be read ({reason}): replace it, or take it out "
                                "of the folder", file=path) from error
            raise DataError(f"the image {path!r} cannot be read ({reason}): replace it, or delete "
                            "the row", file=self.manifest, row=self.rows[index]) from error

    def states(self, indices: Sequence[int]) -> Iterator[bytes]:
        for index in indices:
            path = self.paths[index]
            try:
                stat = os.stat(path)  # noqa: PTH116 — much faster than Path
            except OSError as error:
                raise DataError("the image is gone since it was listed", file=path) from error
            yield repr((path, stat.st_size, stat.st_mtime_ns, self.size)).encode()


def read_folder(
    folder: Path, *, split: str | None, role: str, image_size: int | None, labelled: bool
) -> ImageData:
    """Images in one sub-folder per class, at any depth; without labels, all images at any depth.

    Classes are in natural order ("2" before "10"); hidden files are left out. `split` names a
    sub-folder to read. Where none is named and every sub-folder is called train, test, val, valid
    or validation, the one that suits `role` is read. Raises DataError naming the folder.
    """
    folder = _split_folder(folder.absolute(), split, role)
    paths = _images_below(folder)
    if not paths:
        raise DataError("there are no images in this folder", file=folder)
    files = Files([str(path) for path in paths], image_size)
    if not labelled:
        return ImageData(files)
    names = []
    for path in paths:
        name, *inside = path.relative_to(folder).parts
        if not inside:
            raise DataError("this image is in no class folder: move it into one that is named "
                            "after its class, or ask for unlabelled data", file=path)
        names.append(name)
    labels, classes = numbered(names)
    empty = [name for name in _subfolders(folder) if name not in classes]
    if empty:
        raise DataError("there are no images in this class folder: fill it or delete it",
                        file=folder / empty[0])
    return ImageData(files, labels, classes)


def numbered(names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Labels int64 [N], and the classes that they count: the distinct names in natural order."""
    classes = sorted(set(names), key=natural)
    index = {name: number for number, name in enumerate(classes)}
    return torch.tensor([index[name] for name in names]), classes


def _split_folder(folder: Path, split: str | None, role: str) -> Path:
    names = _subfolders(folder)
    if split is not None:
        if split not in names:
            near = suggest(split, names, n=1)
            raise DataError(f"there is no sub-folder {split!r}; "
                            + (f"did you mean {near[0]!r}?" if near else
                               f"there are {shortened(names)}" if names else "there are none"),
                            file=folder)
        return folder / split
    if names and set(names) <= {name for group in _SPLITS.values() for name in group}:
        for name in _SPLITS[role]:
            if name in names:
                return folder / name
        raise DataError(f"the sub-folders are {shortened(names)}, expected one of "
                        f"{shortened(_SPLITS[role])} for the {role} data: name one with split=",
                        file=folder)
    return folder


def _subfolders(folder: Path) -> list[str]:
    return sorted((entry.name for entry in folder.iterdir()
                   if entry.is_dir() and not entry.name.startswith(".")), key=natural)


def _images_below(folder: Path) -> list[Path]:
    formats = Image.registered_extensions()
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where, name) for name in files if not name.startswith(".")
                  and formats.get(Path(name).suffix.lower()) in Image.OPEN]
    return sorted(found, key=lambda path: natural(str(path)))
