"""Keras layers as ordinary torch modules.

A Keras layer on torch keeps its state in variables that `.train()`, `requires_grad_`,
`load_state_dict(assign=True)` and `copy.deepcopy` do not reach, or not rightly. Here the tensors
belong to the module, parameters or buffers as torch has it, and the layer, empty, only says what to
do with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo_keras.backend import keras


def torch_module(layer: Any) -> nn.Module:
    """The module that does what this built layer (or operation) does, with its weights."""
    if type(layer) is keras.layers.BatchNormalization and not getattr(layer, "renorm", False):
        return Norm(layer)
    if type(layer) is keras.layers.Normalization and layer.weights:
        return Standardised(layer)
    return Stateless(layer)


class Stateless(nn.Module):
    """A Keras layer that gets its state handed in with every call."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.kept = _Kept(layer)
        self.names: list[str] = []
        for variable in self.kept.weights:
            name = variable.name
            if hasattr(self, name) or "." in name:  # of a layer inside this one
                name = f"{name.replace('.', '_')}_{len(self.names)}"
            self.names.append(name)
            value = variable.value.detach()
            if variable.trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)
            variable.value.data = torch.empty(0)  # whoever would use it instead of ours, fails

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.kept.is_layer:
            kwargs["training"] = self.training
        # A layer that updates a buffer in training must not change what backward will read.
        given = [(variable, tensor.clone() if self.training and not variable.trainable else tensor)
                 for variable, tensor in self._state()]
        with keras.StatelessScope(given) as scope:
            out = self.kept.layer(*args, **kwargs)
        with torch.no_grad():
            for variable, tensor in self._state():
                if self.training and not variable.trainable:
                    tensor.copy_(scope.get_current_value(variable))
        for seed in self.kept.seeds:
            if scope.get_current_value(seed) is not None:
                seed.assign(scope.get_current_value(seed))
        return out

    def _state(self) -> list[tuple[Any, Tensor]]:
        return [(variable, getattr(self, name))
                for variable, name in zip(self.kept.weights, self.names, strict=True)]


class Norm(nn.BatchNorm2d):
    """Keras' batch norm as torch's own, so that everything that knows torch's knows it: statistics
    that are frozen, pooled or estimated again."""

    def __init__(self, layer: Any) -> None:
        super().__init__(int(layer.moving_mean.shape[0]), eps=layer.epsilon,
                         momentum=1 - layer.momentum)
        self.axis = int(layer.axis)
        for name, variable in (("weight", layer.gamma), ("bias", layer.beta)):
            self.register_parameter(name, _parameter(variable))
        self.running_mean = layer.moving_mean.value.detach()
        self.running_var = layer.moving_variance.value.detach()

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        moved = x.movedim(self.axis, 1).to(self.running_mean.dtype)  # (B, C, ...)
        return super().forward(moved).movedim(1, self.axis).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Keras has one batch norm for any number of dimensions."""


class Standardised(nn.Module):
    """Keras' Normalization with statistics that were learned from data, which Keras turns into
    constants where a state that is handed in cannot reach them."""

    mean: Tensor
    variance: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.invert = bool(layer.invert)
        self.register_buffer("mean", layer.mean.detach())
        self.register_buffer("variance", layer.variance.detach())

    def forward(self, x: Tensor) -> Tensor:
        std = self.variance.sqrt().clamp(min=keras.config.epsilon())
        return x * std + self.mean if self.invert else (x - self.mean) / std


class _Kept:
    """A layer without its weights. Copies of a network share it: it holds nothing of theirs."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.is_layer = isinstance(layer, keras.Layer)
        if self.is_layer:
            layer.trainable = True  # frozen for a training of Keras' own; zoo decides anew
        self.weights = list(layer.weights) if self.is_layer else []
        own = {id(variable) for variable in self.weights}
        self.seeds = [variable for variable in layer.variables
                      if id(variable) not in own] if self.is_layer else []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


def _parameter(variable: Any) -> nn.Parameter | None:
    return None if variable is None else nn.Parameter(variable.value.detach())
