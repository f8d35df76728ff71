"""Which axes of which tensors may be permuted together, and permuting them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from zoo.errors import FusionError, ShapeMismatch


@dataclass(frozen=True, eq=False)
class Place:
    """Where a group's units stand along one axis of a tensor.

    key: of the state, or of a module whose output it is. index: int64 [units, each]: the positions
    that belong to each unit; several where a map was flattened, channels were concatenated, or
    a unit is a whole attention head.
    """

    key: str
    axis: int
    index: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be permuted in any way without changing what the network computes.

    places: in the state. sites: in the outputs of modules, where the units can be watched.
    parts: for a group of blocks (heads), the names of the groups inside each block, in an order
    in which they correspond.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    sites: tuple[Place, ...] = ()
    parts: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, eq=False)
class Graph:
    """The permutation groups of a network.

    shapes: the shape of each tensor that some group moves. A group inside a block stands before
    the group of its blocks.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        return MappingProxyType({group.name: group for group in self.groups})

    @cached_property
    def outermost(self) -> tuple[Group, ...]:
        """The groups that stand in no block of another."""
        inside = {name for group in self.groups for part in group.parts for name in part}
        return tuple(group for group in self.groups if group.name not in inside)

    def identity(self) -> dict[str, Tensor]:
        """The permutation of each group that changes nothing."""
        return {group.name: torch.arange(group.size) for group in self.groups}

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A uniformly random permutation of each group."""
        return {group.name: torch.randperm(group.size, generator=generator)
                for group in self.groups}

    def moved(self) -> set[tuple[str, int]]:
        """The axes (key, axis) that some group moves."""
        return {(place.key, place.axis) for group in self.groups for place in group.places}


    def parts_together(self, group: Group) -> tuple[Group, ...]:
        """The groups inside a group's blocks, those that correspond as one group of all blocks:
        [blocks · size] units, block by block."""
        return tuple(
            _side_by_side(f"{group.name}/{number}", [self.by_name[name] for name in names])
            for number, names in enumerate(zip(*group.parts, strict=True)))

    def compose(
        self, first: Mapping[str, Tensor], then: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The permutation of each group that does what `first` does and then what `then` does."""
        composed: dict[str, Tensor] = {}

        def follow(group: Group, at: Group) -> None:  # `first` put the group where `at` was
            composed[group.name] = first[group.name][then[at.name]]
            if group.parts:
                for unit, names in zip(first[group.name].tolist(), at.parts, strict=True):
                    for one, other in zip(group.parts[unit], names, strict=True):
                        follow(self.by_name[one], self.by_name[other])

        for group in self.outermost:
            follow(group, group)
        return composed


def permute(
    state: Mapping[str, Tensor], graph: Graph, permutations: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state with each group's units in another order: unit i of the result is unit p[i] of
    the state. The network computes the same.

    state: has at least the graph's keys; it is not changed, and tensors that no group moves are
    handed on as they are. permutations: by the group's name, each int64 [size]; a group that is
    not named stays. Where blocks and their insides are both permuted, the insides come first.
    Raises FusionError for an unknown name or something that is no permutation, ShapeMismatch
    naming the tensor that is not the network's.
    """
    orders: dict[tuple[str, int], Tensor] = {}
    for group, order in _checked(graph, permutations):
        for place in group.places:
            if place.key not in state or tuple(state[place.key].shape) != graph.shapes[place.key]:
                found = list(state[place.key].shape) if place.key in state else "missing"
                raise ShapeMismatch("permute", place.key, f"is {found}, and "
                                    f"{list(graph.shapes[place.key])} in the network that was "
                                    "traced", "Trace the network that these weights belong to")
            length = graph.shapes[place.key][place.axis]
            along = orders.setdefault((place.key, place.axis), torch.arange(length))
            along[place.index] = along[place.index[order]]
    permuted = dict(state)
    for (key, axis), along in orders.items():
        permuted[key] = permuted[key].index_select(axis, along.to(permuted[key].device))
    return permuted


def _side_by_side(name: str, groups: Sequence[Group]) -> Group:
    def joined(places: Sequence[tuple[Place, ...]]) -> tuple[Place, ...]:
        return tuple(Place(same[0].key, same[0].axis, torch.cat([place.index for place in same]))
                     for same in zip(*places, strict=True))

    return Group(name, sum(group.size for group in groups),
                 joined([group.places for group in groups]),
                 joined([group.sites for group in groups]))


def _checked(
    graph: Graph, permutations: Mapping[str, Tensor]
) -> Iterator[tuple[Group, Tensor]]:
    unknown = permutations.keys() - graph.by_name.keys()
    if unknown:
        raise FusionError("permute", f"the network has no group {min(unknown)!r}",
                          "Take the names from graph.groups")
    for group in graph.groups:
        if group.name not in permutations:
            continue
        order = permutations[group.name].cpu()
        if not torch.equal(order.sort().values, torch.arange(group.size)):
            raise FusionError("permute", f"the order of {group.name!r} is no permutation of its "
                              f"{group.size} units")
        yield group, order
