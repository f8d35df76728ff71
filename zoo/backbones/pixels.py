"""Images as every model takes them, and their channels as a network wants them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError

# ITU-R 601, what PIL's "L" uses; the weights add up to one, so grey stays as it is.
_LUMA = (0.299, 0.587, 0.114)


def want_images(images: Tensor) -> None:
    """Raise DataError for what is not float [B, C, H, W]."""
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}, expected "
            "float [B, C, H, W] on [0, 1]; divide 8-bit images by 255 and do not normalise them"
        )


def as_channels(images: Tensor, channels: int) -> Tensor:
    """The same images [B, C, H, W] with the wanted number of channels: grey ⇄ colour, nothing else.
    Raises DataError otherwise."""
    given = images.shape[1]
    if given == channels:
        return images
    if given == 1 and channels == 3:
        return images.expand(-1, 3, -1, -1)
    if given == 3 and channels == 1:
        luma = torch.tensor(_LUMA, device=images.device, dtype=images.dtype)
        return (images * luma.view(1, 3, 1, 1)).sum(1, keepdim=True)
    raise DataError(f"images have {given} channels, the model takes {channels}")


class Pictures:
    """Images [B, C, H, W] on [0, 1], in the channels and sizes that members ask for, each made
    once for all of them. Raises DataError for what are no images."""

    def __init__(self, images: Tensor) -> None:
        want_images(images)
        self.images = images
        self._made: dict[tuple[int, tuple[int, int], str], Tensor] = {}

    def at(self, channels: int, size: tuple[int, int], interpolation: str) -> Tensor:
        """Float32 [B, channels, *size] on [0, 1]; not to be changed, others have it too."""
        key = channels, size, interpolation
        if key not in self._made:
            x = as_channels(self.images, channels).float()
            if tuple(x.shape[-2:]) != size:
                smooth = interpolation in ("bicubic", "bilinear")
                x = functional.interpolate(x, size, mode=interpolation, antialias=smooth)
                x = x.clamp(0, 1)
            self._made[key] = x
        return self._made[key]


def pictures(images: Tensor | Pictures) -> Pictures:
    return images if isinstance(images, Pictures) else Pictures(images)
