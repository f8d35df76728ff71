"""The exact gate: a permuted network computes what it computed before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zoo.fusion.align.graph import Graph, Group, permute

# A wrong permutation changes the output in its leading digits, a right one in float64's last, or
# in float32's where a network computes in float32 whatever it is given.
_TOLERANCE = 1e-6
# How often the network runs to find which groups fail; those not found to hold by then are dropped.
_MOST_RUNS = 200


@torch.no_grad()
def verified(module: nn.Module, example: Tensor, groups: Sequence[Group]) -> list[Group]:
    """The groups under whose permutations the output stays the same, for random weights.

    A cycle of all units and a random order are tried, which nearly always generate every other.
    module, example: as for `trace`.
    """
    state = random_state(module)
    draw = torch.Generator().manual_seed(1)
    # Two inputs, since fewer units are silent on both.
    images = torch.randn(2, *example.shape, generator=draw, dtype=torch.float64)
    expected = outputs(module, state, images)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}

    runs = 0

    def holds(some: Sequence[Group]) -> bool:
        nonlocal runs
        runs += 1
        if runs > _MOST_RUNS:
            return False
        graph = Graph(tuple(some), shapes)
        cycles = {group.name: torch.arange(group.size).roll(1) for group in some}
        for orders in (cycles, graph.random(draw)):
            permuted = permute(state, graph, orders)
            if not close(outputs(module, permuted, images), expected):
                return False
        return True

    kept = _passing(list(groups), holds)
    names = {group.name for group in kept}
    return [replace(group, parts=_kept(group.parts, names)) for group in kept]


def _kept(parts: tuple[tuple[str, ...], ...], names: set[str]) -> tuple[tuple[str, ...], ...]:
    """The insides of blocks that are there in every block."""
    whole = [same for same in zip(*parts, strict=True) if names.issuperset(same)]
    return tuple(zip(*whole, strict=True))


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode that has its own modules and the same tensors."""
    memo = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    # Some networks keep what they computed until they are put into training mode.
    return copy.deepcopy(module, memo).train().eval()


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """Random weights in float64 that a signal survives, none of them zero and no two alike, so
    that every mistake shows: also batch norm's statistics and scales that start at zero."""
    draw = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    drawn: dict[int, Tensor] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in drawn or not tensor.is_floating_point():
            state[key] = drawn.get(id(tensor), tensor.cpu())
            continue
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        if key.endswith("running_var") or (tensor.dim() < 2 and not key.endswith(
                ("bias", "running_mean"))):
            noise = 0.5 + noise.abs()
        elif tensor.dim() < 2:
            noise = noise * 0.3
        else:
            noise = noise * (2 / tensor[0].numel()) ** 0.5
        state[key] = drawn[id(tensor)] = noise
    return state


def outputs(module: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> list[Tensor]:
    """The tensors that the module gives for each of several inputs with this whole state, in
    float64 on the CPU."""
    net = sharing_copy(module)
    for part in net.modules():
        for name in part._non_persistent_buffers_set:  # the state has all the others
            buffer = part._buffers[name]
            if buffer is not None:
                part._buffers[name] = _wide(buffer)
    found = [torch.func.functional_call(net, dict(state), (image.clone(),), tie_weights=False)
             for image in images]
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def close(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(bool((one - other).abs().max() <= _TOLERANCE * other.abs().max())
               for one, other in zip(ones, others, strict=True))


def _passing(groups: list[Group], holds: Callable[[Sequence[Group]], bool]) -> list[Group]:
    """All of them if they hold together, else those that hold by halves, down to single ones."""
    if holds(groups):
        return groups
    if len(groups) < 2:
        return []
    middle = len(groups) // 2
    return _passing(groups[:middle], holds) + _passing(groups[middle:], holds)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
