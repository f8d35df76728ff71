"""Batches in an order that depends on (seed, epoch) alone, and pixels as floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.datasets.images import ImageData
from zoo.errors import DataError


class Batches(DataLoader[Any]):
    """Yields (images [B, C, H, W], labels int64 [B]); `len()` is the number of batches."""

    def __init__(self, data: ImageData, batches: list[list[int]], workers: int) -> None:
        super().__init__(
            _Whole(data),
            sampler=batches,
            batch_size=None,
            num_workers=0 if data.in_memory else workers,
            collate_fn=_as_is,
            generator=torch.Generator(),  # leaves the user's random numbers alone
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, DataError):
                raise batch
            yield batch


def loader(
    data: ImageData,
    *,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    indices: Sequence[int] | Tensor | None = None,
    workers: int = 0,
    drop_last: bool = False,
) -> Batches:
    """One pass over the data, or over `indices` of it, in batches.

    shuffle: in an order drawn from (seed, epoch), both 0 or more. workers: processes that read
    and decode; data in memory need none and use none. drop_last: without a smaller last batch.
    """
    chosen = np.arange(len(data)) if indices is None else np.asarray(indices)
    batches = index_batches(len(chosen), batch_size, shuffle=shuffle, seed=seed, epoch=epoch,
                            drop_last=drop_last)
    return Batches(data, [chosen[batch].tolist() for batch in batches], workers)


def index_batches(
    n: int, size: int, *, shuffle: bool, seed: int = 0, epoch: int = 0, drop_last: bool = False
) -> list[list[int]]:
    """0 to n - 1 in batches of `size`, in order or in one drawn from (seed, epoch)."""
    if size < 1:
        raise DataError(f"batch_size is {size}, expected 1 or more")
    # RandomState's stream is frozen for good; torch's and default_rng's may change.
    order = np.random.RandomState([seed, epoch]).permutation(n) if shuffle else np.arange(n)
    whole = n - n % size if drop_last else n
    return [order[start : start + size].tolist() for start in range(0, whole, size)]


def to_unit(images: Tensor) -> Tensor:
    """Pixels as float32 on [0, 1], on the device where they are: uint8 by x / 255."""
    if images.dtype != torch.uint8:
        return images.to(torch.float32)
    # By a tensor, since CUDA divides by a Python number as a product with its reciprocal.
    return images.to(torch.float32).div_(torch.tensor(255.0, device=images.device))


class _Whole(Dataset[tuple[Tensor, Tensor] | DataError]):
    """A batch as one item. Errors are handed over as values: raised in a worker process, one
    would reach the main process with a traceback for its message and without its file and row."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.data.batch(indices)
        except DataError as error:
            return error


def _as_is(batch: object) -> object:
    return batch
