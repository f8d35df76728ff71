"""Checks of registered data sets. They are opened for real: what they need must be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from zoo.datasets import ImageData, load_data
from zoo.specs import DatasetSpec


def every_split_opens(spec: DatasetSpec) -> None:
    """Each split has images on [0, 255] or [0, 1], labels, and the same classes."""
    classes = set()
    for split in spec.splits:
        data = load_data(spec.name, split=split)
        assert len(data), f"the split {split!r} of {spec.name} is empty"
        assert data.labels is not None, f"the split {split!r} of {spec.name} has no labels"
        images, labels = data.batch(range(min(4, len(data))))
        assert images.ndim == 4, (
            f"{spec.name} gave images of shape {list(images.shape)}, expected [B, C, H, W]")
        assert int(labels.max()) < len(data.classes)
        classes.add(tuple(data.classes))
    assert len(classes) == 1, f"the splits of {spec.name} have different classes"


def opens_the_same_twice(spec: DatasetSpec) -> None:
    """Opened twice, a split has the same images in the same order."""
    one, other = (load_data(spec.name, split=spec.splits[0]) for _ in range(2))
    rows = range(min(16, len(one)))
    assert torch.equal(one.batch(rows)[0], other.batch(rows)[0]), (
        f"{spec.name} gave other images the second time; fix its order")


def splits_do_not_overlap(spec: DatasetSpec) -> None:
    """No image of the test split is in the training split."""
    if len(spec.splits) < 2:
        return
    train, test = (load_data(spec.name, split=split)
                   for split in (spec.splits[0], spec.splits[-1]))
    seen = _hashes(train)
    both = sum(each in seen for each in _hashes(test))
    assert both <= 0.01 * len(test), (
        f"{both} of {len(test)} images of the last split of {spec.name} are in the first")


def _hashes(data: ImageData) -> set[bytes]:
    found: set[bytes] = set()
    for rows in torch.split(torch.arange(len(data)), 1024):
        found |= {image.numpy().tobytes() for image in data.batch(rows)[0]}
    return found


CHECKS: Sequence[Callable[[DatasetSpec], None]] = (
    every_split_opens, opens_the_same_twice, splits_do_not_overlap,
)
