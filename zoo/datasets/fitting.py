"""One image, or a stack of them, brought to the size that a model asks for."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import DataError

_CHUNK = 1024


def fit_picture(picture: Image.Image, size: int | None) -> Tensor:
    """Decode to RGB, resize the shorter side to `size` (bicubic, antialiased), crop the centre.

    Gives uint8 [3, size, size], or the picture's own [3, H, W] when size is None. Raises DataError
    for pixels of more than 8 bits, which RGB cannot hold.
    """
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"its pixels are 16-bit or float (Pillow's mode {picture.mode}), "
                        "expected 8 bits per channel: scale them to 0…255 and save it again")
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")  # a palette with alpha goes to RGB only with a warning
    picture = picture.convert("RGB")
    if size is not None:
        width, height = picture.size
        height, width = _scaled(height, width, size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = _corner(height, width, size)
        picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()  # (3, H, W)


def fit_tensor(images: Tensor, size: int) -> Tensor:
    """The same for images [N, C, H, W], uint8 or float on [0, 1]; gives [N, C, size, size]."""
    height, width = images.shape[-2:]
    if height != size or width != size:
        height, width = _scaled(height, width, size)
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=True)
        top, left = _corner(height, width, size)
        images = images[..., top : top + size, left : left + size]
    return images.clamp(0, 1) if images.is_floating_point() else images.contiguous()


def shrink(images: Tensor, size: int | None) -> Tensor:
    """Images [N, C, H, W] whose shorter side is above `size` fitted to it, others untouched."""
    if size is None or min(images.shape[-2:]) <= size:
        return images
    starts = range(0, len(images), _CHUNK)
    return torch.cat([fit_tensor(images[start : start + _CHUNK], size) for start in starts])


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    short = min(height, width)
    return int(size * height / short), int(size * width / short)


def _corner(height: int, width: int, size: int) -> tuple[int, int]:
    return round((height - size) / 2), round((width - size) / 2)
