"""Random variants of training images, by timm's transforms."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from zoo.datasets import ImageData
from zoo.errors import OptionError

Policy = str | Mapping[str, Any]

_BASIC: Mapping[str, Any] = {"scale": (0.7, 1.0), "hflip": 0.5, "color_jitter": None}


def augmented(data: ImageData, policy: Policy, size: int, seed: Sequence[int]) -> ImageData:
    """The same data, each image changed at random.

    policy: `"basic"` (crops and flips), a timm policy (`"rand-m9-n2"`, `"augmix-m3"`, …) on top of
    it, or a mapping of arguments of `timm.data.create_transform`. size: side of the images given
    out. seed: with an image's position in the data, it decides what happens to the image: not the
    batch that it is in, nor the process that reads it.

    Raises OptionError when timm cannot do it.
    """
    about = json.dumps([policy, size, list(seed), timm.__version__], sort_keys=True)
    return _Augmented(data, transform(policy, size), tuple(seed), about)


def transform(policy: Policy, size: int) -> Callable[[Image.Image], Any]:
    """timm's transform of a picture to uint8 [3, size, size]. Raises OptionError."""
    arguments = dict(_BASIC)
    if isinstance(policy, Mapping):
        arguments.update(policy)
    elif policy != "basic":
        arguments["auto_augment"] = policy
    try:
        if arguments.get("re_prob"):
            raise ValueError("re_prob erases normalised images, and models normalise by themselves")
        made: Callable[[Image.Image], Any] = create_transform(
            (3, size, size), is_training=True, normalize=False, **arguments)
        with _own_random_numbers():
            image = torch.as_tensor(made(Image.new("RGB", (size, size))))
        if image.shape != (3, size, size) or image.dtype != torch.uint8:
            raise ValueError(f"it makes {image.dtype} {list(image.shape)} of a picture")
    except Exception as error:  # timm asserts, and looks names up in dictionaries
        raise OptionError("transfer", f"timm cannot augment by {policy!r}: {error or 'unknown'}; "
                          "expected 'basic', 'rand-m9-n2', 'augmix-m3', … or a mapping of "
                          "timm.data.create_transform's arguments") from None
    return made


class _Augmented(ImageData):
    def __init__(
        self, data: ImageData, change: Callable[[Image.Image], Any], seed: tuple[int, ...],
        about: str,
    ) -> None:
        self.__dict__.update(copy.copy(data).__dict__)
        self.data = data
        self.change = change
        self.seed = seed
        self.about = about

    @property
    def in_memory(self) -> bool:
        return False

    def fingerprint(self) -> str:
        data = self.data if self.labels is not None else self.data.without_labels()
        told = f"{data.fingerprint()} {self.about}".encode()
        return hashlib.blake2b(told, digest_size=16).hexdigest()

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.data.batch(indices)
        changed = []
        with _own_random_numbers():
            for index, image in zip(torch.as_tensor(indices).tolist(), images, strict=True):
                _seed((*self.seed, index))
                changed.append(torch.as_tensor(self.change(_picture(image))))
        return torch.stack(changed), labels


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Put back the three generators that timm draws from."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _seed(numbers: tuple[int, ...]) -> None:
    seed = hash(numbers) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device


def _picture(image: Tensor) -> Image.Image:
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
