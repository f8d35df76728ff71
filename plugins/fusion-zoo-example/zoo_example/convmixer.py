"""ConvMixer: Trockman & Kolter 2022, "Patches are all you need?", arXiv:2201.09792."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.backbones import Preprocessing
from zoo.errors import OptionError, WeightsError


class ConvMixer(nn.Module):
    """Patches, mixed over space and then over channels, with timm's semantics: `forward_features`
    is the trunk, `forward_head` pools and classifies, `reset_classifier` gives a fresh head."""

    def __init__(
        self, num_classes: int, in_chans: int, size: int, width: int, depth: int, kernel: int,
        patch: int,
    ) -> None:
        super().__init__()
        # zoo hands over images on [0, 1]: resized and normalised as this says.
        self.preprocessing = Preprocessing(size=(size, size)).for_channels(in_chans)
        self.num_features = self.head_hidden_size = width
        self.stem = _activated(nn.Conv2d(in_chans, width, patch, stride=patch))
        self.blocks = nn.Sequential(*(Block(width, kernel) for _ in range(depth)))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        maps: Tensor = self.blocks(self.stem(x))  # (B, width, H/patch, W/patch)
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))  # (B, width)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.head: nn.Module = (
            nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity())


class Block(nn.Module):
    """A depthwise convolution that is added, then a pointwise one."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.space = _activated(nn.Conv2d(width, width, kernel, padding="same", groups=width))
        self.channels = _activated(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.channels(x + self.space(x))
        return mixed


def _activated(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.GELU(), nn.BatchNorm2d(convolution.out_channels))


def build(
    *,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    width: int = 64,
    depth: int = 4,
    kernel: int = 5,
    patch: int = 2,
) -> ConvMixer:
    """The network for squares of 32 pixels, or of another size. There are no published weights.

    num_classes: of the head; None is the network's own number. pretrained: with its published
    weights, which must never be random ones. image_size: side of the square, in pixels. Raises
    WeightsError when it shall be pretrained, OptionError for options out of range.

    Options:
        width: channels, and features of the head
        depth: blocks
        kernel: side of the depthwise convolutions, in patches
        patch: side of a patch, in pixels
    """
    if pretrained:
        raise WeightsError("example/convmixer has no published weights; pass "
                           "pretrained=False and train it: zoo.transfer(model, data)")
    size = 32 if image_size is None else image_size
    if min(width, depth, kernel, patch) < 1 or size < patch:
        raise OptionError("convmixer", f"width is {width}, depth {depth}, kernel {kernel}, patch "
                          f"{patch} and image_size {size}, expected positive numbers and a patch "
                          "that fits into the image")
    return ConvMixer(10 if num_classes is None else num_classes, in_chans, size, width, depth,
                     kernel, patch)
