"""A Keras model with timm's semantics: feature maps, pooled features, classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from zoo.backbones import Preprocessing
from zoo_keras.backend import keras
from zoo_keras.program import Program, Step, steps_of

Mode = Literal["caffe", "tf", "torch", "pixels", "unit"]

# Keras' preprocess_input by mode, from pixels on [0, 1]. "caffe" subtracts these means, in RGB
# here, on [0, 255] and then wants blue, green, red; "pixels" is [0, 255] as Keras loads images.
_STATISTICS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "caffe": ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255,) * 3),
    "tf": ((0.5,) * 3, (0.5,) * 3),
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "pixels": ((0.0,) * 3, (1 / 255,) * 3),
    "unit": ((0.0,) * 3, (1.0,) * 3),
}
_SCALING = (keras.layers.Rescaling, keras.layers.Normalization)
_POOLING = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D,
            keras.layers.Flatten)
# What may come between the classifier and the answer.
_AFTERWARDS = (keras.layers.Activation, keras.layers.Softmax, keras.layers.Flatten,
               keras.layers.Reshape)


class KerasNet(nn.Module):
    """A Keras model with one image as input, [B, C, H, W] as everywhere in torch.

    model: Functional or Sequential, built. mode: its preprocessing. size: (height, width) that it
    looks at. fold_scaling: take layers that scale the pixels first out of the network, into
    `preprocessing`.

    answers: the activation of the classifier that the model came with, "" without one. Only
    softmax and linear are kept, as logits. label_names: what the logits count, where that is known.
    source: where the weights come from. options: of the builder, to build the network again.
    """

    label_names: tuple[str, ...] = ()

    def __init__(
        self, model: Any, *, mode: Mode, size: tuple[int, int], fold_scaling: bool = False
    ) -> None:
        super().__init__()
        self.source: dict[str, Any] = {}
        self.options: dict[str, Any] = {}
        steps, start = steps_of(model)
        channels = int(model.inputs[0].shape[-1])
        mean, std = _STATISTICS[mode]
        self.preprocessing = Preprocessing(mean, std, size, "bilinear").for_channels(channels)
        self.flip = mode == "caffe" and channels == 3
        if fold_scaling:
            scaling = _leading(steps)
            steps = steps[len(scaling):]
            start = scaling[-1].out if scaling else start
            mean, std = _affine(scaling, channels)
            self.preprocessing = Preprocessing(mean, std, size, "bilinear")
        trunk, neck, head, self.answers = _parted(steps)
        self.head: nn.Module = nn.Identity()
        if head is not None and self.answers in ("softmax", "linear"):
            self.head = _linear(head.layer)
        last = (neck or trunk)[-1].shape
        pools = not neck and len(last) == 4
        self.head_hidden_size = int(last[-1] if pools else math.prod(last[1:]))  # type: ignore[arg-type]
        self.num_features = int(trunk[-1].shape[-1])  # type: ignore[arg-type]
        self.trunk = Program(trunk, start)
        self.neck = Program(neck, trunk[-1].out)

    @property
    def num_classes(self) -> int:
        return self.head.out_features if isinstance(self.head, nn.Linear) else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps [B, C, H, W] of prepared images; where the network has none, [B, D]."""
        if self.flip:
            x = x.flip(1)
        with keras.device(str(x.device)):
            z: Tensor = self.trunk(x.permute(0, 2, 3, 1)).to(x.dtype)  # (B, H, W, C)
        return z.permute(0, 3, 1, 2) if z.ndim == 4 else z

    def forward_head(self, z: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, classes], or the features [B, D] that the classifier gets."""
        x = z
        if len(self.neck.layers):
            with keras.device(str(z.device)):
                x = self.neck(z.permute(0, 2, 3, 1)).to(z.dtype)
        elif z.ndim == 4:
            x = z.mean((2, 3))
        x = x.flatten(1)  # (B, D)
        return x if pre_logits else cast(Tensor, self.head(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        self.head = (nn.Linear(self.head_hidden_size, num_classes) if num_classes
                     else nn.Identity())


def _leading(steps: Sequence[Step]) -> list[Step]:
    scaling: list[Step] = []
    for step in steps:
        if not isinstance(step.layer, _SCALING):
            break
        scaling.append(step)
    return scaling


@torch.no_grad()
def _affine(scaling: Sequence[Step], channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and standard deviation, for pixels on [0, 1], that do what these layers do with
    pixels on [0, 255]."""
    x = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 1, 1, channels)
    for step in scaling:
        x = step.layer(x)
    black, white = x[:, 0, 0].double()  # (C,)
    std = 1 / (white - black)
    return tuple((-black * std).tolist()), tuple(std.tolist())


def _parted(steps: Sequence[Step]) -> tuple[list[Step], list[Step], Step | None, str]:
    """Up to the last feature maps; from there to the features, [] where these do not come by
    pooling; the classifier; and its activation."""
    made_by = {step.out: step for step in steps}

    def before(step: Step) -> Step | None:
        return None if step.source is None else made_by.get(step.source)

    step: Step | None = steps[-1]
    answers = "linear"
    while step is not None and isinstance(step.layer, _AFTERWARDS):
        answers = _activation(step.layer, answers)
        step = before(step)
    head = step if step is not None and _classifies(step, before(step)) else None
    answers = _activation(head.layer, answers) if head else ""
    left = list(steps[:steps.index(head)] if head else steps)
    neck: list[Step] = []
    step = left[-1]
    while step is not None:
        neck.insert(0, step)
        step_before = before(step)
        if (isinstance(step.layer, _POOLING) and step_before is not None
                and len(step_before.shape) == 4):
            outs = {each.out for each in neck}
            return [each for each in left if each.out not in outs], neck, head, answers
        step = step_before
    return left, [], head, answers


def _activation(layer: Any, so_far: str) -> str:
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    if not hasattr(layer, "activation"):
        return so_far
    name = str(keras.activations.serialize(layer.activation))
    return so_far if name == "linear" else name


def _classifies(step: Step, before: Step | None) -> bool:
    """A dense layer, or a convolution that is one: 1 × 1 on a map of 1 × 1."""
    layer = step.layer
    if type(layer) is not keras.layers.Dense and not (
            type(layer) is keras.layers.Conv2D and layer.kernel_size == (1, 1)):
        return False
    return before is not None and all(side == 1 for side in before.shape[1:-1])


def _linear(layer: Any) -> nn.Linear:
    kernel = layer.kernel.value.detach()
    kernel = kernel.reshape(-1, kernel.shape[-1])  # (D, classes)
    linear = nn.Linear(kernel.shape[0], kernel.shape[1], bias=layer.use_bias)
    linear.weight = nn.Parameter(kernel.T.contiguous())
    if layer.use_bias:
        linear.bias = nn.Parameter(layer.bias.value.detach())
    return linear



