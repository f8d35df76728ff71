"""Several data sets as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoo.datasets.batches import to_unit
from zoo.datasets.fitting import fit_tensor
from zoo.datasets.images import ImageData, Source
from zoo.errors import DataError


def join(parts: Sequence[ImageData]) -> ImageData:
    """All images of these data sets, in order, with labels that count in the first's classes.

    Images of unlike data sets are made alike: squares of the largest size among them, colour where
    one has colour, floats where one has floats.

    Raises DataError when a part has no labels, or a class that the first has not.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.labels is None for part in parts):
        raise DataError("these images have no labels, and joined data sets need them")
    aligned = [part.with_classes(parts[0].classes) for part in parts]
    labels = torch.cat([part.labels for part in aligned if part.labels is not None])
    joined = _Parts(aligned)
    images: Tensor | Source = joined
    if all(part.in_memory for part in aligned):
        images = torch.cat([joined.alike(part.batch(range(len(part)))[0]) for part in aligned])
    return ImageData(images, labels, parts[0].classes)


class _Parts:
    """A Source that hands each index on to the part that it falls into."""

    def __init__(self, parts: Sequence[ImageData]) -> None:
        self.parts = parts
        self.sampled = any(part.sampled for part in parts)
        self.ends = list(itertools.accumulate(len(part) for part in parts))
        samples = [part[0][0] for part in parts]  # (C, H, W) each
        self.shapes = {sample.shape for sample in samples}
        self.channels = max(sample.shape[0] for sample in samples)
        self.side = max(min(sample.shape[1:]) for sample in samples)
        self.floats = any(sample.is_floating_point() for sample in samples)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        part, inside = self._place(index)
        return self.alike(self.parts[part][inside][0][None])[0]

    def states(self, indices: Sequence[int]) -> Iterator[bytes]:
        for part, places in itertools.groupby(map(self._place, indices), key=lambda at: at[0]):
            inside = [position for _, position in places]
            yield self.parts[part].subset(inside).fingerprint().encode()

    def alike(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W] of one part as those of all parts are."""
        if self.floats:
            images = to_unit(images)
        if len(self.shapes) == 1:
            return images
        return fit_tensor(images, self.side).expand(-1, self.channels, -1, -1)

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)
