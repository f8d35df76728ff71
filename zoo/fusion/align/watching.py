"""Run a network with given weights and watch what its modules put out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def watched(
    module: nn.Module,
    state: Mapping[str, Tensor],
    batch: Tensor,
    names: Collection[str],
    see: Callable[[str, Tensor], Tensor | None],
    *,
    inputs: bool = False,
) -> None:
    """Run the module in its mode on a batch.

    state: of tied weights the first counts. see: gets the name and the output (or the first input)
    of each module in `names`, as often as it runs; a tensor that it returns takes its place.
    """
    def hook(name: str) -> Any:
        if inputs:
            return lambda module, given: see(name, given[0])
        return lambda module, given, out: see(name, out)

    own = module.state_dict(keep_vars=True)
    first = {id(tensor): key for key, tensor in reversed(own.items())}
    with ExitStack() as stack:
        for name in names:
            watch = module.get_submodule(name)
            register = watch.register_forward_pre_hook if inputs else watch.register_forward_hook
            stack.callback(register(hook(name)).remove)
        torch.func.functional_call(module, {key: state[key] for key in first.values()}, (batch,))
