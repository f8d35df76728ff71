from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.datasets import Batches, ImageData, load_data
from zoo.errors import OptionError
from zoo.training.augmentation import augmented

POLICIES: list[Any] = [
    "basic", "rand-m9-n2", "augmix-m3", "original", {"scale": (0.5, 1.0)},
    {"auto_augment": "3a", "color_jitter": 0.4}, {"train_crop_mode": "rkrc"},
]


def pictures(n: int = 6, channels: int = 3, side: int = 20) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
    return ImageData(images, [0] * n)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_size_type_and_seed(policy: Any) -> None:
    data = pictures()
    first, labels = augmented(data, policy, 16, (0, 1)).batch(range(6))
    assert first.shape == (6, 3, 16, 16)
    assert first.dtype == torch.uint8
    assert labels.tolist() == [0] * 6
    again = augmented(data, policy, 16, (0, 1)).batch(range(6))[0]
    assert torch.equal(first, again)
    other = augmented(data, policy, 16, (0, 2)).batch(range(6))[0]
    assert not torch.equal(first, other)


def test_an_image_does_not_depend_on_its_batch() -> None:
    data = augmented(pictures(), "rand-m9-n2", 16, (0,))
    together = data.batch([4, 2, 0])[0]
    assert torch.equal(together[1], data.batch(torch.tensor([2]))[0][0])
    assert not data.in_memory


def test_grey_and_float_images() -> None:
    grey = pictures(channels=1)
    whole = grey.batch(range(6))[0]
    floats = ImageData(whole / 255, [0] * 6)
    a = augmented(grey, "basic", 16, (3,)).batch(range(6))[0]
    b = augmented(floats, "basic", 16, (3,)).batch(range(6))[0]
    assert torch.equal(a, b)
    assert torch.equal(a[:, 0], a[:, 2])


def test_generators_are_left_alone() -> None:
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    augmented(pictures(), "augmix-m3", 16, (0,)).batch(range(6))
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert torch.equal(torch.get_rng_state(), own)


def test_files_in_worker_processes(tmp_path: Path) -> None:
    for index, image in enumerate(pictures().batch(range(6))[0]):
        folder = tmp_path / "a"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    data = augmented(load_data(tmp_path, image_size=20), "rand-m9-n2", 16, (0,))
    order = [[0, 1], [2, 3], [4, 5]]
    alone = [images for images, _ in Batches(data, order, 0)]
    helped = [images for images, _ in Batches(data, order, 2)]
    assert torch.equal(torch.cat(alone), torch.cat(helped))


@pytest.mark.parametrize(("policy", "problem"), [
    ("rnd-m9", "cannot augment by 'rnd-m9'.*expected 'basic', 'rand-m9-n2'"),
    ("rand-q3", "cannot augment by 'rand-q3'"),
    ({"hflp": 0.5}, "unexpected keyword argument 'hflp'"),
    ({"re_prob": 0.5}, "re_prob erases normalised images"),
    ({"separate": True}, "cannot augment by"),
], ids=str)
def test_what_timm_cannot_do(policy: Any, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        augmented(pictures(), policy, 16, (0,))
