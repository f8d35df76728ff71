"""What everything downstream consumes: labelled images that are fetched a batch at a time."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.datasets.fitting import shrink
from zoo.errors import DataError
from zoo.names import suggest

NO_LABEL = -1

_CHUNK = 4096


class Source(Protocol):
    """Images that are read one by one: files, or the items of another data set."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Tensor:
        """One image [C, H, W], uint8 on 0…255 or float32 on [0, 1]."""

    def states(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Bytes that change when these images change."""


class ImageData(Dataset[tuple[Tensor, int]]):
    """Images with labels, in memory or read when asked for.

    images: uint8 [N, C, H, W] on 0…255 or float on [0, 1], kept as it is, or a Source.
    labels: N ints that count in `classes`, or None. classes: the names, "0", "1", … by default.

    Raises DataError when there are no images, floats leave [0, 1] (naming the image), or a label
    has no class.
    """

    classes: tuple[str, ...]
    labels: Tensor | None

    def __init__(
        self,
        images: Tensor | Source,
        labels: Tensor | Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if len(images) == 0:
            raise DataError("there are no images")
        self._images = checked(images) if isinstance(images, Tensor) else images
        self._rows = torch.arange(len(images))  # subsets share the images and differ in this
        self.labels, self.classes = None, ()
        if labels is not None:
            self.labels = _counted(torch.as_tensor(labels), len(images))
            self.classes = _named(self.labels, classes)

    @property
    def in_memory(self) -> bool:
        """Whether a batch costs a copy only, and no reading or decoding."""
        return isinstance(self._images, Tensor)

    @property
    def sampled(self) -> bool:
        """Whether the fingerprint is of some of the images only: other images may have the same."""
        return bool(getattr(self._images, "sampled", False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[int(self._rows[index])]  # (C, H, W)
        return image, NO_LABEL if self.labels is None else int(self.labels[index])

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels int64 [B], which are -1 for unlabelled data.

        Raises DataError when the images differ in size, or one cannot be read.
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        rows = self._rows[chosen]
        labels = torch.full_like(rows, NO_LABEL) if self.labels is None else self.labels[chosen]
        if isinstance(self._images, Tensor):
            return self._images[rows], labels  # (B, C, H, W), (B,)
        return stack([self._images[row] for row in rows.tolist()]), labels

    def subset(self, indices: Sequence[int] | Tensor) -> ImageData:
        """The images at these positions, in this order; nothing is copied."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        if len(chosen) == 0:
            raise DataError("there are no images in this subset")
        part = copy.copy(self)
        part._rows = self._rows[chosen]
        part.labels = None if self.labels is None else self.labels[chosen]
        return part

    def take(self, n: int, seed: int = 0) -> ImageData:
        """At most n images at random, with the same share of every class (to within one image).

        The same (n, seed) gives the same images in every version.
        """
        if n < 1:
            raise DataError(f"cannot take {n} images, expected 1 or more")
        return self if n >= len(self) else self.subset(self._stratified(n, seed).nonzero()[:, 0])

    def split(self, fraction: float, seed: int = 0) -> tuple[ImageData, ImageData]:
        """(rest, held_out): held_out has this fraction of every class (to within one image)."""
        n = round(fraction * len(self))
        if not 0 < n < len(self):
            raise DataError(f"cannot hold out {fraction} of {len(self)} images, expected a "
                            "fraction in (0, 1) that leaves at least one image on either side")
        held_out = self._stratified(n, seed)
        return self.subset((~held_out).nonzero()[:, 0]), self.subset(held_out.nonzero()[:, 0])

    def without_labels(self) -> ImageData:
        """The same images, unlabelled."""
        part = copy.copy(self)
        part.labels, part.classes = None, ()
        return part

    def with_classes(self, classes: Sequence[str]) -> ImageData:
        """The same images with labels that count in `classes`, matched by name.

        Raises DataError naming the class of these data that `classes` lacks.
        """
        if self.labels is None:
            raise DataError("these images have no labels")
        position = {name: index for index, name in enumerate(classes)}
        for name in self.classes:
            if name not in position:
                near = suggest(name, classes, n=1)
                raise DataError(f"the data have a class {name!r} that is not among the "
                                f"{len(classes)} classes asked for ({shortened(classes)})"
                                + (f"; did you mean {near[0]!r}?" if near else ""))
        part = copy.copy(self)
        part.labels = torch.tensor([position[name] for name in self.classes])[self.labels]
        part.classes = tuple(classes)
        return part

    def shrunk(self, size: int | None) -> ImageData:
        """Images in memory whose shorter side is above `size` resized and cropped to it."""
        if not isinstance(self._images, Tensor):
            return self
        part = copy.copy(self)
        part._images = shrink(self._images, size)
        return part

    def fingerprint(self) -> str:
        """A hash of the labels and the pixels in memory, or the paths, sizes and times of files.

        Of another data set's items, 256 at even distances are read.
        """
        digest = hashlib.blake2b(repr((self.classes, len(self))).encode(), digest_size=16)
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if isinstance(self._images, Tensor):
            digest.update(repr((self._images.shape[1:], self._images.dtype)).encode())
            for start in range(0, len(self), _CHUNK):
                rows = self._rows[start : start + _CHUNK]
                digest.update(self._images[rows].numpy().tobytes())
        else:
            for state in self._images.states(self._rows.tolist()):
                digest.update(len(state).to_bytes(8, "little") + state)
        return digest.hexdigest()

    def told(self) -> dict[str, Any]:
        """What a recipe says of these images, as JSON values."""
        return {"images": len(self), "data": self.fingerprint()}

    def _stratified(self, n: int, seed: int) -> Tensor:
        """A mask of n images, evenly spaced in a list that is grouped by class, else shuffled."""
        # RandomState's stream is frozen for good; torch's and default_rng's may change.
        order = torch.from_numpy(np.random.RandomState(seed).permutation(len(self)))
        if self.labels is not None:
            order = order[self.labels[order].argsort(stable=True)]
        steps = torch.arange(len(self) + 1) * n // len(self)
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[order[steps.diff() > 0]] = True
        return mask


def checked(images: Tensor, first: int = 0) -> Tensor:
    """Images [N, C, H, W] as uint8, or as float32 on [0, 1]; `first` is the number of the first.

    Raises DataError for another type or shape, or naming the first image with floats outside.
    """
    if images.ndim != 4:
        raise DataError(f"the images have shape {list(images.shape)}, expected [N, C, H, W]")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"the images are {images.dtype}, expected torch.uint8 on 0…255 "
                        "or floats on [0, 1]")
    low, high = images.amin((1, 2, 3)), images.amax((1, 2, 3))  # (N,)
    outside = ~((low >= 0) & (high <= 1))  # true for NaN as well
    if outside.any():
        index = int(outside.nonzero()[0])
        raise DataError(
            f"image {first + index} has values from {low[index]:.4g} to {high[index]:.4g}, "
            "expected floats on [0, 1]: drop Normalize (every model normalises by itself), "
            "and divide 0…255 by 255 or keep it as uint8")
    return images.to(torch.float32)


def stack(images: list[Tensor]) -> Tensor:
    """Images [C, H, W] as one [B, C, H, W]; raises DataError when they differ in size."""
    for image in images:
        if image.shape != images[0].shape:
            sizes = " and ".join("×".join(map(str, x.shape)) for x in (images[0], image))
            raise DataError(f"the images differ in size ({sizes}): give image_size")
    return torch.stack(images)  # (B, C, H, W)


def shortened(names: Sequence[str], most: int = 8) -> str:
    """The names with commas between, those in the middle left out when there are many."""
    if len(names) > most:
        names = [*names[: most - 1], "…", names[-1]]
    return ", ".join(names)


def _counted(labels: Tensor, n: int) -> Tensor:
    if labels.shape != (n,):
        raise DataError(f"the labels have shape {list(labels.shape)}, expected one for each "
                        f"of the {n} images")
    if labels.is_floating_point():
        raise DataError(f"the labels are {labels.dtype}, expected whole numbers from 0")
    return labels.to("cpu", torch.int64)


def _named(labels: Tensor, classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None:
        classes = [str(index) for index in range(int(labels.max()) + 1)]
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
        index = int(outside.nonzero()[0])
        raise DataError(f"image {index} has the label {int(labels[index])}, expected "
                        f"0 to {len(classes) - 1} ({shortened(classes)})")
    return tuple(classes)
