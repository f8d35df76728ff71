"""Several data sets as one."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from zoo.datasets.images import ImageData, Source
from zoo.errors import DataError


def join(parts: Sequence[ImageData]) -> ImageData:
    """All images of these data sets, in order, with labels that count in the first's classes.

    Raises DataError when a part has a class that the first has not, or no labels.
    """
    if len(parts) == 1:
        return parts[0]
    aligned = [parts[0], *(part.with_classes(parts[0].classes) for part in parts[1:])]
    labels = [part.labels for part in aligned if part.labels is not None]
    if len(labels) < len(parts):
        raise DataError("these images have no labels")
    images: Tensor | Source = _Parts(aligned)
    if all(part.in_memory for part in aligned):
        stacks = [part.batch(range(len(part)))[0] for part in aligned]
        if len({(stack.shape[1:], stack.dtype) for stack in stacks}) == 1:
            images = torch.cat(stacks)
    return ImageData(images, torch.cat(labels), parts[0].classes)


class _Parts:
    """A Source that hands each index on to the part that it falls into."""

    def __init__(self, parts: Sequence[ImageData]) -> None:
        self.parts = parts
        self.ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        part, inside = self._place(index)
        return self.parts[part][inside][0]

    def states(self, indices: Sequence[int]) -> Iterator[bytes]:
        for part, inside in map(self._place, indices):
            yield self.parts[part].subset([inside]).fingerprint().encode()

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect.bisect_right(self.ends, index)
        return part, index - (self.ends[part - 1] if part else 0)
