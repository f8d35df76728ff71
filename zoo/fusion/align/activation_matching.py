"""Activation matching: Li et al. 2015, "Convergent learning: do different neural networks learn the
same representations?", arXiv:1511.07543; for merging, Ainsworth et al. 2023, arXiv:2209.04836 and
Jordan et al. 2023, arXiv:2211.08403."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.fusion.align.assignment import assign
from zoo.fusion.align.graph import Graph, Group
from zoo.fusion.align.watching import watched

State = Mapping[str, Tensor]
# Rows (images × places) of one batch that are compared; of more, evenly spaced ones.
MOST_ROWS = 4096


@torch.no_grad()
def match_activations(
    module: nn.Module,
    reference: State,
    state: State,
    graph: Graph,
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """The permutations under which a network's units correlate most with the reference's on data.

    Each group's units are watched where modules put them out; correlations over images and places
    are added up over these outputs. A group that no module puts out keeps its order.

    module: takes both states. batches: inputs [B, ...], read twice. Returns the permutation of
    each group. Raises DataError when there is no batch.
    """
    groups = [group for group in graph.groups if group.sites]
    together = [part for group in groups for part in graph.parts_together(group)]
    correlations = _correlations(module, [reference, state], [*groups, *together], batches)
    orders = graph.identity()
    inside = {name for group in groups for part in group.parts for name in part}
    for group in groups:
        if group.name not in inside:
            orders |= assign(graph, group, lambda group: correlations[group.name])
    return orders


def _correlations(
    module: nn.Module, states: Sequence[State], groups: Sequence[Group],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """For each group, Σ over its sites of the correlation [units, units] of two networks' units."""
    axes = {site.key: site.axis for group in groups for site in group.sites}
    moments = [_Moments(), _Moments()]
    for batch in batches:
        for state, part in zip(states, moments, strict=True):
            for key, rows in _rows(module, state, batch, axes).items():
                part.add(key, rows)
    if not moments[0].counts:
        raise DataError("there is no batch to compare activations on")
    found = {group.name: torch.zeros(group.size, group.size) for group in groups}
    for batch in batches:
        one, other = (
            {key: part.standardise(key, rows)
             for key, rows in _rows(module, state, batch, axes).items()}
            for state, part in zip(states, moments, strict=True))
        for group in groups:
            for site in group.sites:
                for slot in site.index.T:  # a unit's first place with the other's first, …
                    found[group.name] += (one[site.key][:, slot].T @ other[site.key][:, slot]
                                          / moments[0].counts[site.key]).cpu()
    return found


class _Moments:
    """Mean and deviation of each channel over all rows."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def add(self, key: str, rows: Tensor) -> None:
        wide = rows.double()
        self.counts[key] = self.counts.get(key, 0) + len(rows)
        self.sums[key] = self.sums.get(key, 0) + wide.sum(0)
        self.squares[key] = self.squares.get(key, 0) + wide.square().sum(0)

    def standardise(self, key: str, rows: Tensor) -> Tensor:
        """Rows with mean 0 and deviation 1; a channel that never changes is 0."""
        mean = self.sums[key] / self.counts[key]
        variance = (self.squares[key] / self.counts[key] - mean.square()).clamp(min=0)
        alive = variance > 1e-10 * (mean.square() + 1e-30)
        scale = torch.where(alive, variance, 1).rsqrt() * alive
        return ((rows - mean) * scale).to(rows.dtype)


def _rows(
    module: nn.Module, state: State, batch: Tensor, axes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Each watched module's output as rows [images × places, channels]."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, out: Tensor) -> None:
        rows = out.movedim(axes[name], -1).flatten(0, -2)
        step = -(-len(rows) // MOST_ROWS)
        found.setdefault(name, []).append(rows[::step])

    watched(module, state, batch, axes, keep)
    return {name: torch.cat(rows) for name, rows in found.items()}
