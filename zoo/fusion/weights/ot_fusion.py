"""OT fusion: Singh & Jaggi 2020, "Model fusion via optimal transport", arXiv:1910.05653."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from zoo.errors import FusionError, OptionError
from zoo.fusion.align import Graph, Group, permute
from zoo.fusion.align.assignment import assign
from zoo.fusion.candidates import is_statistic
from zoo.fusion.merging import mixture, pooled
from zoo.fusion.weights.average import average

State = Mapping[str, Tensor]


def ot_fusion(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    graph: Graph,
    regularisation: float = 0.0,
) -> dict[str, Tensor]:
    """Transport each member's units onto the first member's, layer by layer, then average.

    From the input to the output, a layer's units are moved to those with the nearest incoming
    weights, whose own inputs have been moved before; both sides weigh all units equally. The
    exact transport of equally many units is a permutation. A regularised one splits units, and
    changes what a member computes. In contrast to `rebasin`, outgoing weights have no say and each
    layer is settled once. The paper also fuses networks of unlike widths; here all members have the
    same shapes. Attention heads are always matched exactly.

    states: one whole state per member. weights: by key, one number per member, for the average.
    graph: what may be permuted. Returns the keys of `weights` and running statistics. Raises
    FusionError when nothing in the network can be permuted, OptionError for a negative number.
    Singh & Jaggi 2020, arXiv:1910.05653.

    Options:
        regularisation: weight of the transport's entropy (Sinkhorn), as a part of the mean squared
            distance of two units; 0 for the exact transport
    """
    if regularisation < 0:
        raise OptionError("ot_fusion", f"regularisation is {regularisation}, expected 0 or more")
    if not graph.groups:
        raise FusionError("ot_fusion", "no units of this network can be permuted",
                          "'average' does without")
    first, *others = states
    moved = [first, *(_moved(first, state, graph, weights, regularisation) for state in others)]
    fused = {key: average([state[key] for state in moved], base=None, key=key, weight=row)
             for key, row in weights.items()}
    shares = mixture(next(iter(weights.values())))
    return fused | {key: pooled(moved, key, shares) for key in first if is_statistic(key)}


def _moved(
    target: State, state: State, graph: Graph, keys: Collection[str], regularisation: float
) -> State:
    """The state with its units where the target has theirs."""
    inside = {name for group in graph.groups for part in group.parts for name in part}
    for group in graph.groups:
        if group.name in inside:
            continue
        if group.parts or not regularisation:
            near = _Nearness(target, state, keys)
            state = permute(state, graph, assign(graph, group, near))
            continue
        one, other = (_incoming(each, group, keys) for each in (target, state))
        cost = torch.cdist(one, other).square()  # (units, units)
        plan = _sinkhorn(cost, regularisation * float(cost.mean()))
        state = _transported(state, group, plan)
    return state


class _Nearness:
    """Similarity of units by their incoming weights; for permutations, the nearest in squared
    distance are those of the largest inner products."""

    def __init__(self, target: State, state: State, keys: Collection[str]) -> None:
        self.states = target, state
        self.keys = keys

    def __call__(self, group: Group) -> Tensor:
        one, other = (_incoming(state, group, self.keys) for state in self.states)
        return one @ other.T


def _incoming(state: State, group: Group, keys: Collection[str]) -> Tensor:
    """Each unit's incoming weights, biases and norms, [units, all of them]."""
    parts = [state[place.key][place.index].flatten(1) for place in group.places
             if place.axis == 0 and place.key in keys]
    return torch.cat(parts, 1)


def _sinkhorn(cost: Tensor, strength: float, rounds: int = 200) -> Tensor:
    """The entropic plan [n, n] between equal units, its rows and columns summing to one."""
    plan = -cost.double() / max(strength, torch.finfo(torch.float64).tiny)
    for _ in range(rounds):
        plan = plan - plan.logsumexp(1, keepdim=True)
        plan = plan - plan.logsumexp(0, keepdim=True)
    return plan.exp()


def _transported(state: State, group: Group, plan: Tensor) -> State:
    """Unit i of the result is the mixture of units that row i of the plan says."""
    changed = dict(state)
    for place in group.places:
        old = changed[place.key].movedim(place.axis, 0)
        new = old.clone()
        for slot in place.index.T:  # a unit's first place becomes a mixture of first places, …
            new[slot] = torch.einsum("ij,j...->i...", plan.to(old), old[slot])
        changed[place.key] = new.movedim(0, place.axis)
    return changed
