"""What a member gives to a fusion of features: the output of some of its layers, pooled or whole.

A layer is a module by its name in the network (`layer3`, `blocks.4`). Nothing that comes after the
last of those asked for is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.backbones.semantics import as_maps, as_tokens, on_one_grid, unpooled
from zoo.errors import OptionError, ZooError
from zoo.names import suggest

POOLS = ("avg", "max", "avgmax", "gem", "cls")


def want_layers(net: nn.Module, name: str, layers: Sequence[str]) -> None:
    """Raises OptionError for a layer that this network, of this name, does not have."""
    names = [module for module, _ in net.named_modules() if module]
    for layer in layers:
        if layer not in names:
            near = suggest(layer, names)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
            raise OptionError("layer", f"{name} has no layer {layer!r}{hint} it has "
                              f"{', '.join(_depths(net))}, and what is inside them")


def chosen(
    net: nn.Module, x: Tensor, gives: str, layers: Sequence[str], pool: str | None
) -> Tensor:
    """Vectors [B, D], tokens [B, N, D] or maps [B, D, h, w] of a prepared batch [B, C, H, W].

    layers: by name; several are put side by side, after those of unlike grids are resampled to the
        finest. Without any it is what comes before the network's pooling.
    pool: one of POOLS: the vector of each layer, for tokens and maps as the one token or position.
        None takes the class token of a network that does so itself and averages otherwise (for
        vectors), or does not pool (for tokens and maps).

    Raises ZooError for a layer that has no maps where some are needed, and for a pool that needs
    a class token and finds none.
    """
    outputs = outputs_of(net, x, layers) if layers else [unpooled(net, x)]
    if pool or gives == "vectors":
        vector = torch.cat([_vector(net, x, one, pool) for one in outputs], 1)
        return {"vectors": vector, "tokens": vector[:, None],
                "maps": vector[:, :, None, None]}[gives]
    if gives == "tokens":
        sequences = [as_tokens(net, one) for one in outputs]
        if len({one.shape[1] for one in sequences}) == 1:
            return torch.cat(sequences, 2)
    grids = torch.cat(on_one_grid([as_maps(net, x, one) for one in outputs]), 1)
    return grids.flatten(2).transpose(1, 2) if gives == "tokens" else grids


def outputs_of(net: nn.Module, x: Tensor, layers: Sequence[str]) -> list[Any]:
    """What each of these layers gives, the first time that it runs, on the way to the features."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            found.setdefault(name, output)
            if len(found) == len(set(layers)):
                raise _Enough

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(keep(name)) for name in set(layers)]
    try:
        unpooled(net, x)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in layers if name not in found]
    if missing:
        raise ZooError(f"its layer {missing[0]!r} is not run on the way to its features; choose "
                       f"one of {', '.join(_depths(net))}")
    return [found[name] for name in layers]


class _Enough(Exception):
    """All that was asked for is there."""


def _vector(net: nn.Module, x: Tensor, output: Any, pool: str | None) -> Tensor:
    """One layer's output [B, D], [B, N, D] or a grid, as a vector [B, D]."""
    if isinstance(output, Tensor) and output.ndim == 2:
        return output
    prefix = _prefix(net, output)
    if pool is None:
        own = getattr(net, "global_pool", None)
        pool = "cls" if own == "token" and prefix else "avg"
    if pool == "cls":
        if not prefix:
            raise ZooError("it has no class token for pool='cls'; choose one of "
                           f"{', '.join(map(repr, POOLS[:-1]))}")
        return cast(Tensor, output)[:, 0]
    z = as_tokens(net, output)[:, prefix:]  # (B, N, D)
    if pool == "gem":
        return z.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    if pool == "max":
        return z.amax(1)
    return z.mean(1) if pool == "avg" else (z.mean(1) + z.amax(1)) / 2


def _prefix(net: nn.Module, output: Any) -> int:
    """How many of a layer's tokens come before its patches."""
    sequence = isinstance(output, Tensor) and output.ndim == 3
    return int(getattr(net, "num_prefix_tokens", 0)) if sequence else 0


def _depths(net: nn.Module) -> list[str]:
    """The layers that a network's features are usually taken from, by name."""
    told: Any = getattr(net, "feature_info", None)
    infos = getattr(told, "info", told)
    modules = dict(net.named_modules())
    if isinstance(infos, (list, tuple)):
        named = [str(info["module"]) for info in infos if isinstance(info, dict)
                 and info.get("module") in modules]
        if named:
            return named
    return [name for name, _ in net.named_children()]
