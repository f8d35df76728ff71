"""The two-convolution network of the MNIST robustness literature.

Wong & Kolter 2018, "Provable Defenses against Adversarial Examples via the Convex Outer
Adversarial Polytope", arXiv:1711.00851; also in Wong et al. 2020, arXiv:2001.03994.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.backbones.preprocessing import Preprocessing
from zoo.errors import OptionError, WeightsError


class MnistCnn(nn.Module):
    """Two 4 × 4 convolutions of stride 2 and a hidden layer, with timm's semantics."""

    def __init__(
        self, num_classes: int, in_chans: int, image_size: int, width: int, drop_rate: float
    ) -> None:
        super().__init__()
        side = image_size // 2 // 2
        self.num_classes = num_classes
        self.num_features = 32 * width
        self.head_hidden_size = 100 * width
        self.conv1 = nn.Conv2d(in_chans, 16 * width, 4, stride=2, padding=1)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16 * width, 32 * width, 4, stride=2, padding=1)
        self.act2 = nn.ReLU()
        self.fc1 = nn.Linear(32 * width * side * side, self.head_hidden_size)
        self.act3 = nn.ReLU()
        self.drop = nn.Dropout(drop_rate)
        self.fc2: nn.Module
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))  # (B, 16, H/2, W/2)
        return self.act2(self.conv2(x))  # type: ignore[no-any-return]  # (B, 32, H/4, W/4)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.act3(self.fc1(torch.flatten(x, 1))))  # (B, 100)
        return x if pre_logits else self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc2

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc2 = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()


def build(
    *,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    width: int = 1,
    drop_rate: float = 0.0,
) -> MnistCnn:
    """The network for squares of 28 pixels, or of another size. There are no published weights.

    Options:
        width: times as many channels and hidden units
        drop_rate: dropout before the classifier, in [0, 1)
    """
    if pretrained:
        raise WeightsError("zoo/mnist_cnn has no published weights; pass pretrained=False and "
                           "train it: zoo.transfer(model, data)")
    size = 28 if image_size is None else image_size
    if size < 8 or width < 1:
        raise OptionError("zoo/mnist_cnn", f"image_size is {size} and width {width}, expected 8 "
                          "pixels or more and width 1 or more")
    net = MnistCnn(10 if num_classes is None else num_classes, in_chans, size, width, drop_rate)
    net.preprocessing = Preprocessing((0.1307,) * 3, (0.3081,) * 3, (size, size))  # type: ignore[assignment]
    return net
