"""Random variants of training images, by timm's transforms."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zoo.datasets import ImageData
from zoo.errors import OptionError

_BASIC: Mapping[str, Any] = {"scale": (0.7, 1.0), "hflip": 0.5, "color_jitter": None}


def augmented(data: ImageData, policy: str | Mapping[str, Any] | None, size: int) -> ImageData:
    """The same data, each image changed at random whenever it is read.

    policy: `"basic"` (crops and flips), a timm policy (`"rand-m9-n2"`, `"augmix"`, …) on top of it,
    or a mapping of arguments of `timm.data.create_transform`. size: side of the images given out.
    Raises OptionError when timm does not know it.
    """
    from timm.data import create_transform

    arguments = dict(_BASIC)
    if isinstance(policy, Mapping):
        arguments.update(policy)
    elif policy != "basic":
        arguments["auto_augment"] = policy
    try:
        transform = create_transform((3, size, size), is_training=True, normalize=False,
                                     **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise OptionError("transfer", f"timm cannot augment by {policy!r}: {error}") from None
    return _Augmented(data, transform)


class _Augmented(ImageData):
    def __init__(self, data: ImageData, transform: Any) -> None:
        self.__dict__.update(copy.copy(data).__dict__)
        self.data = data
        self.transform = transform

    @property
    def in_memory(self) -> bool:
        return False

    def batch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.data.batch(indices)
        # timm draws from three generators; tied to torch's, an epoch's images depend on its seed.
        state = random.getstate()
        random.seed(int(torch.randint(2**31, ()).item()))
        try:
            changed = [self.transform(_picture(image)) for image in images]
        finally:
            random.setstate(state)
        return torch.stack([torch.as_tensor(image) for image in changed]), labels


def _picture(image: Tensor) -> Image.Image:
    pixels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    if pixels.shape[0] == 1:
        pixels = pixels.expand(3, -1, -1)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
