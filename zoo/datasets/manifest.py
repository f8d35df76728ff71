"""CSV and TSV files: a manifest of image files, or the pixels themselves."""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from zoo.datasets.files import Files, numbered
from zoo.datasets.fitting import shrink
from zoo.datasets.images import ImageData, shortened
from zoo.errors import DataError
from zoo.names import suggest

_FEWEST_PIXELS = 16  # fewer columns without a `path` are a manifest with a mistake
_MOST_LABEL = 32767
_PIXELS = frozenset(map(str, range(256)))
_INTEGER = re.compile(r"[+-]?[0-9]+")
_GRID = re.compile(r"([0-9]+)x([0-9]+)")

Rows = Iterator[tuple[int, list[str]]]


def read_csv(path: Path, *, image_size: int | None, labelled: bool) -> ImageData:
    """Read a manifest (columns `path` and `label`) or pixels (`label` and 16 columns or more).

    A manifest's paths are relative to its folder; its other columns are left out of account.
    Pixels are 0…255, row by row, for colour one channel after the other, in columns named `1x1` to
    `28x28` (height × width) or, for square images, anything; without a header the label is first.
    Classes are the distinct labels in natural order. A `.tsv` is separated by tabs.

    Raises DataError with the file and the row, counted as an editor counts lines.
    """
    rows = _rows(path)
    first, header = next(rows, (1, []))
    if not header:
        raise DataError("the file is empty, expected a header like 'path,label' and a row for "
                        "each image", file=path)
    if len(header) >= _FEWEST_PIXELS and all(map(_INTEGER.fullmatch, header)):
        return _read_pixels(path, _without_header(path, len(header), labelled), image_size)
    twice = [name for name, n in Counter(header).items() if n > 1]
    if twice:
        raise DataError(f"the header has {twice[0]!r} more than once: rename or delete a column",
                        file=path, row=first)
    if labelled and "label" not in header:
        raise _no_column("label", header, path, first)
    if "path" in header:
        return _read_manifest(path, header, rows, image_size, labelled)
    if len(header) < _FEWEST_PIXELS:
        raise _no_column("path", header, path, first)
    return _read_pixels(path, _with_header(path, first, header, labelled), image_size)


def _rows(path: Path) -> Rows:
    """(line, fields) of every row that is not blank; the line is where the row begins."""
    line = 1
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
            for fields in reader:
                if fields:
                    yield line, [field.strip() for field in fields]
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise DataError(f"the file is not UTF-8 text ({error.reason}): save it as UTF-8",
                        file=path) from None
    except csv.Error as error:
        raise DataError(f"this is not CSV ({error}): check the quotes", file=path,
                        row=line) from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _no_column(name: str, header: Sequence[str], path: Path, row: int) -> DataError:
    near = suggest(name, header, n=1) if len(header) > 1 else []
    hint = f": rename {near[0]!r} to {name!r}" if near else (
        ", and a manifest has 'path' and 'label' separated by "
        + ("tabs" if _delimiter(path) == "\t" else "commas"))
    return DataError(f"there is no column {name!r}; the columns are {shortened(header)}{hint}",
                     file=path, row=row)


def _wrong_width(fields: Sequence[str], width: int, path: Path, row: int) -> DataError:
    return DataError(f"expected {width} columns, the row has {len(fields)}; a text with a "
                     "separator in it needs quotes", file=path, row=row)


def _read_manifest(
    path: Path, header: list[str], rows: Rows, image_size: int | None, labelled: bool
) -> ImageData:
    folder = str(path.absolute().parent)
    image = header.index("path")
    label = header.index("label") if labelled else None
    files: list[str] = []
    lines: list[int] = []
    names: list[str] = []
    for line, fields in rows:
        if len(fields) != len(header):
            raise _wrong_width(fields, len(header), path, line)
        if not fields[image]:
            raise DataError("the path is empty: fill it in or delete the row", file=path, row=line)
        file = os.path.join(folder, fields[image])  # noqa: PTH118 — much faster than Path
        if not os.path.isfile(file):  # noqa: PTH113
            raise DataError(f"the image {fields[image]!r} does not exist (looked in {folder}): "
                            "correct the path or delete the row", file=path, row=line)
        files.append(file)
        lines.append(line)
        if label is not None:
            if not fields[label]:
                raise DataError("the label is empty: fill it in, or delete the row", file=path,
                                row=line)
            names.append(fields[label])
    if not files:
        raise DataError("there is a header and no row below it", file=path)
    source = Files(files, image_size, path, lines)
    if label is None:
        return ImageData(source)
    return ImageData(source, *numbered(names))


@dataclass(frozen=True)
class _Layout:
    """Which columns are what. header: the line where the header begins, 0 without one."""

    width: int
    label: int | None
    pixels: list[int]
    shape: tuple[int, int, int]
    header: int


def _without_header(path: Path, width: int, labelled: bool) -> _Layout:
    if not labelled and (shape := _square(width)):
        return _Layout(width, None, list(range(width)), shape, 0)
    shape = _square(width - 1)
    if shape is None:
        raise _not_square(width - 1, path, 1)
    return _Layout(width, 0 if labelled else None, list(range(1, width)), shape, 0)


def _with_header(path: Path, row: int, header: list[str], labelled: bool) -> _Layout:
    pixels = [column for column, name in enumerate(header) if name != "label"]
    names = [header[column] for column in pixels]
    grid = _GRID.fullmatch(names[-1])
    shape: tuple[int, int, int] | None
    if grid and _GRID.fullmatch(names[0]):
        height, width = int(grid[1]), int(grid[2])
        if names != [f"{y}x{x}" for y in range(1, height + 1) for x in range(1, width + 1)]:
            raise DataError(f"the pixel columns are not 1x1, 1x2, … {names[-1]} in this order",
                            file=path, row=row)
        shape = (1, height, width)
    else:
        shape = _square(len(pixels))
        if shape is None:
            raise _not_square(len(pixels), path, row)
    label = header.index("label") if labelled else None
    return _Layout(len(header), label, pixels, shape, row)


def _square(pixels: int) -> tuple[int, int, int] | None:
    for channels in (1, 3):
        side = isqrt(pixels // channels)
        if channels * side * side == pixels:
            return channels, side, side
    return None


def _not_square(pixels: int, path: Path, row: int) -> DataError:
    return DataError(f"{pixels} pixel columns are no square image, grey or of three channels: name "
                     "them '1x1' … 'HxW', or name the column of a manifest's images 'path'",
                     file=path, row=row)


def _read_pixels(path: Path, layout: _Layout, image_size: int | None) -> ImageData:
    first = next((line for line, _ in _rows(path) if line > layout.header), None)
    if first is None:
        raise DataError("there is a header and no row below it", file=path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # older numpy only warns of 2.5 among integers
            table = np.loadtxt(path, np.int16, delimiter=_delimiter(path), comments=None,
                               quotechar='"', skiprows=first - 1, ndmin=2,
                               encoding="utf-8-sig")  # (N, columns)
    except (ValueError, Warning) as error:
        _raise_for_first_bad_row(path, layout, str(error))
    if table.shape[1] != layout.width:
        _raise_for_first_bad_row(path, layout, "")
    pixels = table[:, layout.pixels]
    labels = None if layout.label is None else table[:, layout.label]
    if pixels.min() < 0 or pixels.max() > 255 or (labels is not None and labels.min() < 0):
        _raise_for_first_bad_row(path, layout, "")
    images = torch.from_numpy(pixels.astype(np.uint8)).reshape(-1, *layout.shape)  # (N, C, H, W)
    images = shrink(images, image_size)
    if labels is None:
        return ImageData(images)
    numbers, index = np.unique(labels, return_inverse=True)
    return ImageData(images, torch.from_numpy(index), [str(number) for number in numbers])


def _raise_for_first_bad_row(path: Path, layout: _Layout, reason: str) -> NoReturn:
    """Go over the rows again, one by one, for the error to name the row."""
    for line, fields in _rows(path):
        if line <= layout.header:
            continue
        if len(fields) != layout.width:
            raise _wrong_width(fields, layout.width, path, line)
        if layout.label is not None:
            label = fields[layout.label]
            if not label:
                raise DataError("the label is empty: fill it in, or delete the row", file=path,
                                row=line)
            if not _between(label, _MOST_LABEL):
                raise DataError(f"the label is {label!r}, expected a whole number from 0 to "
                                f"{_MOST_LABEL}", file=path, row=line)
        if _PIXELS.issuperset(fields[column] for column in layout.pixels):
            continue
        for column in layout.pixels:
            if not _between(fields[column], 255):
                raise DataError(f"the pixel in column {column + 1} is {fields[column]!r}, expected "
                                "a whole number from 0 to 255", file=path, row=line)
    raise DataError(f"the pixels cannot be read ({reason})", file=path)


def _between(text: str, most: int) -> bool:
    return bool(_INTEGER.fullmatch(text)) and 0 <= int(text) <= most
