"""Swap every activation of a network for another, such as ReLU for a ReLU-only network."""

from __future__ import annotations

from timm.layers import get_act_layer
from torch import nn

from zoo.errors import OptionError
from zoo.names import suggest

ACTIVATIONS = (
    "relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "selu", "gelu", "gelu_tanh",
    "quick_gelu", "silu", "mish", "hard_swish", "tanh",
)
# What bends a feature map. Sigmoids and softmaxes are gates and weights, and stay.
_KINDS = {
    "ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "GELUTanh", "QuickGELU",
    "SiLU", "Swish", "Mish", "Hardswish", "HardSwish", "HardMish", "HardMishMe", "Softplus", "Tanh",
}


def swap_activations(net: nn.Module, name: str) -> int:
    """Replace every activation module in place and say how many there were.

    name: timm's (`relu`, `gelu`, `silu`, `leaky_relu`, …). Gates (sigmoid, softmax) stay, and so do
    activations that are written as function calls. Raises OptionError for an unknown name, or when
    the network has no activation modules.
    """
    if name not in ACTIVATIONS:
        near = suggest(name, ACTIVATIONS)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise OptionError("activation", f"no activation is called {name!r}{hint}", ACTIVATIONS)
    made = get_act_layer(name)
    places = [(parent, key) for parent in net.modules()
              for key, child in parent._modules.items() if type(child).__name__ in _KINDS]
    if not places:
        raise OptionError("activation", f"{type(net).__name__} has no activation modules to swap")
    for parent, key in places:
        setattr(parent, key, made().to(next(net.parameters())))
    return len(places)

