"""Git Re-Basin: Ainsworth et al. 2023, "Git Re-Basin: merging models modulo permutation
symmetries", arXiv:2209.04836."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import FusionError, OptionError
from zoo.fusion.align import Graph, match_activations, match_weights, permute
from zoo.fusion.align.repairing import repaired, shares_of
from zoo.fusion.merging import mixture, pooled
from zoo.fusion.norms import MEAN, VARIANCE
from zoo.fusion.weights.average import average

State = Mapping[str, Tensor]


def rebasin(
    states: Sequence[State],
    *,
    base: State | None,
    weights: Mapping[str, Sequence[float]],
    graph: Graph,
    module: nn.Module | None = None,
    data: Iterable[Tensor] | None = None,
    seed: int = 0,
    matching: Literal["weights", "activations"] = "weights",
    center: Literal["first", "mean"] = "first",
    restarts: int = 3,
    max_iter: int = 100,
    repair: bool = False,
) -> dict[str, Tensor]:
    """Permute the members' units until they correspond, then average: Σ wᵢπᵢ(θᵢ) / Σ wᵢ.

    For networks trained from different starts, whose plain average is noise. Running statistics
    move along and are pooled. A network computes the same before and after its permutation.

    states: one whole state per member. base: not used. weights: w by key, one per member. graph:
    what may be permuted. module, data: the network and batches [B, ...] for it, for matching by
    activations and for repair. seed: of random starts and of the order of groups. Returns the
    keys of `weights` and running statistics. Raises FusionError when data are needed and none are
    given, or nothing in the network can be permuted. Ainsworth et al. 2023, arXiv:2209.04836;
    repair from Jordan et al. 2023, arXiv:2211.08403.

    Options:
        matching: by inner products of weights, or correlations of activations on data
        center: match to the first member, or (weights only) go on with each to the others' mean
        restarts: starts of weight matching, all but the first random; the best is taken
        max_iter: rounds over all groups at most, and of matching to the mean
        repair: give activations the members' mean and deviation again, on data
    """
    for name, value in (("restarts", restarts), ("max_iter", max_iter)):
        if value < 1:
            raise OptionError("rebasin", f"{name} is {value}, expected 1 or more")
    if not graph.groups:
        raise FusionError("rebasin", "no units of this network can be permuted",
                          "'average' does without")
    looks = [f"{name}={value!r}" for name, value, does in (
        ("matching", matching, matching == "activations"), ("repair", repair, repair)) if does]
    if matching == "activations" and center == "mean":
        raise OptionError("rebasin", "center is 'mean', which needs matching='weights'")
    if looks and (module is None or data is None):
        raise FusionError("rebasin", f"{looks[0]} looks at activations, and no data are given",
                          "Pass data=, images like those that the members were trained on")
    if matching == "activations":
        assert module is not None
        assert data is not None
        aligned = [states[0], *(
            permute(state, graph, match_activations(module, states[0], state, graph, data))
            for state in states[1:])]
    else:
        aligned = _matched(states, graph, weights, center, restarts, max_iter, seed)
    fused = {key: average([state[key] for state in aligned], base=None, key=key, weight=share)
             for key, share in weights.items()}
    if repair:
        assert module is not None
        assert data is not None
        return repaired(module, {**states[0], **fused}, aligned, shares_of(weights), data)
    of_layer = {key.rpartition(".")[0]: mixture(share) for key, share in weights.items()}
    for key, tensor in states[0].items():
        if tensor.is_floating_point() and key.rpartition(".")[2] in (MEAN, VARIANCE):
            fused[key] = pooled(aligned, key, of_layer.get(key.rpartition(".")[0],
                                                           shares_of(weights)))
    return fused


def _matched(
    states: Sequence[State], graph: Graph, weights: Mapping[str, Sequence[float]], center: str,
    restarts: int, max_iter: int, seed: int,
) -> list[State]:
    """The members, all permuted onto the first, or (Ainsworth 2023, algorithm 3) then each onto
    the mean of the others, until none moves."""
    keys = list(weights)
    aligned = [states[0]]
    for state in states[1:]:
        order = match_weights(states[0], state, graph, keys=keys, restarts=restarts,
                              max_iter=max_iter, seed=seed)
        aligned.append(permute(state, graph, order))
    identity = graph.identity()
    for _ in range(max_iter if center == "mean" and len(states) > 2 else 0):
        moved = False
        for number, state in enumerate(aligned):
            others = aligned[:number] + aligned[number + 1:]
            mean = {key: torch.stack([other[key] for other in others]).mean(0) for key in keys}
            order = match_weights(mean, state, graph, keys=keys, max_iter=max_iter, seed=seed)
            if any(not torch.equal(order[name], same) for name, same in identity.items()):
                aligned[number], moved = permute(state, graph, order), True
        if not moved:
            break
    return aligned
