"""torchvision's families of classifiers with timm's semantics.

What torchvision runs in one `forward` is taken apart into trunk, pooling and head. The parts stay
torchvision's own modules under their own names, so the keys of the state are torchvision's.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Classifier(nn.Module):
    """A torchvision network, taken apart; of what is in neither trunk nor head (the auxiliary
    classifiers of GoogLeNet and Inception v3) nothing is kept.

    TRUNK, HEAD: the children that run one after another before and after the pooling; the last
    layer of the head is the classifier. POOLED: the side of the pooled map. FLAT: whether the
    head takes vectors, or flattens the map itself. BIAS: whether the classifier has one.
    """

    TRUNK: ClassVar[tuple[str, ...]] = ("features",)
    HEAD: ClassVar[tuple[str, ...]] = ("classifier",)
    POOLED: ClassVar[int] = 1
    FLAT: ClassVar[bool] = True
    BIAS: ClassVar[bool] = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name in (*self.TRUNK, *self.HEAD):
            child = getattr(net, name)
            self.add_module(name, nn.Sequential(*child) if isinstance(child, nn.ModuleList)
                            else child)
        matrices = [layer.weight for layer in self.head_layers()
                    if isinstance(layer, (nn.Linear, nn.Conv2d))]
        self.num_classes = matrices[-1].shape[0]
        self.num_features = matrices[0].shape[1] // self.POOLED**2
        self.head_hidden_size = matrices[-1].shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """What the trunk makes of normalised images [B, C, H, W]: maps [B, num_features, h, w], or
        the tokens [B, N, num_features] of a vision transformer."""
        for name in self.TRUNK:
            x = getattr(self, name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of the trunk's features, or pooled features
        [B, head_hidden_size]."""
        x = self._pool(x)
        *before, classifier = self.head_layers()
        for layer in before:
            x = layer(x)
        return x if pre_logits else cast(Tensor, classifier(x))

    def _pool(self, x: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(x, self.POOLED)  # (B, C, P, P)
        return x.flatten(1) if self.FLAT else x

    def head_layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for name in self.HEAD:
            child = getattr(self, name)
            layers += child if isinstance(child, nn.Sequential) else [child]
        return layers

    def get_classifier(self) -> nn.Module:
        return self.head_layers()[-1]

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for this many classes; 0 leaves the pooled features as they are."""
        self.num_classes = num_classes
        fresh = (nn.Linear(self.head_hidden_size, num_classes, self.BIAS) if num_classes
                 else nn.Identity())
        last = getattr(self, self.HEAD[-1])
        if isinstance(last, nn.Sequential):
            last[-1] = fresh
        else:
            setattr(self, self.HEAD[-1], fresh)


class AlexNet(Classifier):
    POOLED = 6


class VGG(Classifier):
    POOLED = 7


class ConvNeXt(Classifier):
    FLAT = False


class DenseNet(Classifier):
    TRUNK = ("features", "relu")

    def __init__(self, net: nn.Module) -> None:
        net.relu = nn.ReLU(inplace=True)  # a function in torchvision
        super().__init__(net)


class GoogLeNet(Classifier):
    TRUNK = ("conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b",
             "maxpool3", "inception4a", "inception4b", "inception4c", "inception4d", "inception4e",
             "maxpool4", "inception5a", "inception5b")
    HEAD = ("dropout", "fc")


class Inception(Classifier):
    TRUNK = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1",
             "Conv2d_4a_3x3", "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a",
             "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c")
    HEAD = ("dropout", "fc")


class MaxVit(Classifier):
    TRUNK = ("stem", "blocks")
    FLAT = False
    BIAS = False


class MNASNet(Classifier):
    TRUNK = ("layers",)


class RegNet(Classifier):
    TRUNK = ("stem", "trunk_output")
    HEAD = ("fc",)


class ResNet(Classifier):
    TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    HEAD = ("fc",)


class ShuffleNet(Classifier):
    TRUNK = ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")
    HEAD = ("fc",)


class SqueezeNet(Classifier):
    """Its classifier is a 1 × 1 convolution whose answers are rectified and then averaged, so the
    logits are not a function of the averaged features."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        dropout, convolution, relu, average = self.head_layers()
        x = dropout(x)  # (B, 512, h, w)
        if not pre_logits:
            x = relu(convolution(x))  # (B, num_classes, h, w)
        return cast(Tensor, average(x)).flatten(1)

    def get_classifier(self) -> nn.Module:
        return self.head_layers()[1]

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        cast(Any, self.classifier)[1] = (
            nn.Conv2d(self.head_hidden_size, num_classes, 1) if num_classes else nn.Identity())


class SwinTransformer(Classifier):
    TRUNK = ("features", "norm", "permute")
    HEAD = ("head",)


class VisionTransformer(Classifier):
    TRUNK = ("conv_proj", "encoder")
    HEAD = ("heads",)

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.class_token = cast(nn.Parameter, net.class_token)

    def forward_features(self, x: Tensor) -> Tensor:
        x = cast(Any, self).conv_proj(x).flatten(2).transpose(1, 2)  # (B, N - 1, D)
        token = self.class_token.expand(x.shape[0], -1, -1)  # (B, 1, D)
        return cast(Tensor, cast(Any, self).encoder(torch.cat([token, x], 1)))  # (B, N, D)

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, 0]


# By the module of torchvision.models that makes them.
FAMILIES: dict[str, type[Classifier]] = {
    "alexnet": AlexNet,
    "convnext": ConvNeXt,
    "densenet": DenseNet,
    "efficientnet": Classifier,
    "googlenet": GoogLeNet,
    "inception": Inception,
    "maxvit": MaxVit,
    "mnasnet": MNASNet,
    "mobilenetv2": Classifier,
    "mobilenetv3": Classifier,
    "regnet": RegNet,
    "resnet": ResNet,
    "shufflenetv2": ShuffleNet,
    "squeezenet": SqueezeNet,
    "swin_transformer": SwinTransformer,
    "vgg": VGG,
    "vision_transformer": VisionTransformer,
}
