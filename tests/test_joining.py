from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo.datasets import ImageData, join, load_data
from zoo.errors import DataError

A, B = ("cat", "dog"), ("dog", "cat")


def grey(n: int, side: int = 8, value: int = 100) -> torch.Tensor:
    return torch.full((n, 1, side, side), value, dtype=torch.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (12, 12), colour).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_labels_count_in_the_first_classes() -> None:
    joined = join([ImageData(grey(2), [0, 1], A), ImageData(grey(2, value=7), [0, 1], B)])
    assert joined.classes == A
    assert joined.labels is not None
    assert joined.labels.tolist() == [0, 1, 1, 0]
    assert joined.in_memory
    assert joined.batch([1, 2])[0][:, 0, 0, 0].tolist() == [100, 7]


def test_one_part_is_itself() -> None:
    data = ImageData(grey(2), [0, 1], A)
    assert join([data]) is data


def test_sizes_and_types_are_made_alike() -> None:
    joined = join([ImageData(grey(2, 8), [0, 1], A),
                   ImageData(torch.rand(3, 3, 12, 16), [0, 1, 1], A)])
    images, labels = joined.batch(range(5))
    assert images.shape == (5, 3, 12, 12)
    assert images.dtype == torch.float32
    assert images[:2].sub(100 / 255).abs().max() < 1e-6
    assert labels.tolist() == [0, 1, 0, 1, 1]


def test_files_and_memory_together(photos: Path) -> None:
    files = load_data(photos, image_size=12)
    joined = join([ImageData(grey(3, 8), [1, 0, 1], A), files])
    images, labels = joined.batch([0, 3, 6])
    assert images.shape == (3, 3, 12, 12)
    assert images[:, :, 0, 0].tolist() == [[100] * 3, [255, 0, 0], [0, 0, 255]]
    assert labels.tolist() == [1, 0, 1]
    assert not joined.in_memory


def test_fingerprint_follows_files_and_pixels(photos: Path) -> None:
    def mark(value: int = 100) -> str:
        return join([ImageData(grey(2, 8, value), [0, 1], A),
                     load_data(photos, image_size=12)]).fingerprint()

    first = mark()
    assert mark() == first
    assert mark(101) != first
    file = photos / "dog" / "1.png"
    os.utime(file, ns=(1, 1))
    assert mark() != first


def test_fingerprint_of_a_part_of_it(photos: Path) -> None:
    joined = join([ImageData(grey(2, 8), [0, 1], A), load_data(photos, image_size=12)])
    assert joined.subset([0, 4]).fingerprint() != joined.subset([0, 5]).fingerprint()
    assert joined.subset([4, 0, 5]).fingerprint() != joined.subset([0, 4, 5]).fingerprint()


def test_what_cannot_be_joined() -> None:
    data = ImageData(grey(2), [0, 1], A)
    for parts in ([data, data.without_labels()], [data.without_labels(), data]):
        with pytest.raises(DataError, match="no labels, and joined data sets need them"):
            join(parts)
    with pytest.raises(DataError, match="a class 'fox' that is not among the 2 classes"):
        join([data, ImageData(grey(1), [0], ["fox"])])
