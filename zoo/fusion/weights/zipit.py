"""ZipIt: Stoica et al. 2024, "ZipIt! Merging models from different tasks without training",
arXiv:2305.03053."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.align import Graph, Group
from zoo.fusion.align.watching import watched
from zoo.fusion.candidates import is_statistic
from zoo.fusion.merging import mixture
from zoo.fusion.precision import doubled
from zoo.fusion.weighting import want_shares

State = Mapping[str, Tensor]
# Rows (images × places) of one output of a batch that are compared; of more, evenly spaced ones.
_ROWS = 2048
# Below every correlation: of features that were merged before, and of pairs that should not be.
_LATE, _LAST = -2.0, 4.0
# Variance, with an output's as 1, of what does not change but for rounding.
_STILL = 1e-12


def zipit(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    graph: Graph,
    module: nn.Module,
    data: Iterable[Tensor],
    report: dict[str, Any] | None = None,
    alpha: float = 0.3,
    beta: float = 0.125,
) -> dict[str, Tensor]:
    """Merge the features that correlate most, across members and within, until one's are left.

    Of a layer's features in all members, the two that correlate most on the images become one,
    until there are as many as one member has; the merged feature is their mean, and takes the place
    of each of them in the next layer. The paper may stop at a layer and keep the heads of unlike
    tasks behind it, a composite; here all layers are zipped into one network, for members of the
    same labels. The paper's code has alpha on all that was merged; here a third member's feature
    joins those of two others without, or three that are the same would not find each other.
    Attention heads, and units that no module puts out, are averaged in their order. Batch norm
    should be estimated again (data=, norms="auto"): where features that are unlike were merged,
    running statistics that are meaned do not fit, and members whose batch norm was frozen can have
    no others.

    states: one whole state per member. weights: by key, one number ≥ 0 per member, in the means.
    graph: what may be permuted. data: batches [B, C, H, W]. report: gets `across`, the part of the
    merged features that have several members' in them, by group. Returns the keys of `weights` and
    running statistics. Raises FusionError when nothing can be merged, DataError without images,
    OptionError. Stoica et al. 2024, arXiv:2305.03053.

    Options:
        alpha: factor on the correlations of a feature that was merged, with features that
            would bring a member in twice, in [0, 1]; 0 merges none of these while there are others
        beta: fraction of its features that a member may merge among themselves, in [0, 1]
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise OptionError("zipit", f"{name} is {value}, expected a factor in [0, 1]")
    want_shares("zipit", weights)
    inside = {name for group in graph.groups for part in group.parts for name in part}
    groups = [group for group in graph.groups
              if group.sites and not group.parts and group.name not in inside]
    if not groups:
        raise FusionError("zipit", "no units of this network can be merged",
                          "'average' does without")
    zips = {name: _zipped(found, len(states), alpha, beta)
            for name, found in _correlations(states, groups, module, data).items()}
    if report is not None:
        report["across"] = {name: _across(places, len(states)) for name, places in zips.items()}
    places: dict[str, list[tuple[int, Group, Tensor]]] = {}
    for group in groups:
        for place in group.places:
            places.setdefault(place.key, []).append((place.axis, group, place.index))
    plain = mixture(next(iter(weights.values())))
    return {key: _merged([state[key] for state in states], places.get(key, []), zips,
                         weights.get(key, plain))
            for key in states[0] if key in weights or is_statistic(key)}


def _correlations(
    states: Sequence[State], groups: Sequence[Group], module: nn.Module, data: Iterable[Tensor]
) -> dict[str, Tensor]:
    """For each group the correlations of all members' units, [members · units] squared, over all
    outputs in which they stand: each output is scaled to a mean variance of 1, so that it counts
    for a unit by how much the unit moves there.

    Two units that move nowhere are as near as their constants: 1 less the largest distance, in
    these scales. Else a dead unit would be near to nothing, its own copy in another member
    included.
    """
    standing: dict[str, list[tuple[Group, Tensor]]] = {}
    axes = {}
    for group in groups:
        for site in group.sites:
            standing.setdefault(site.key, []).append((group, site.index))
            axes[site.key] = site.axis
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    for batch in data:
        for key, x in _outputs(module, states, batch, axes).items():
            wide = doubled(x)
            total, square, count = sums.get(key, (0, 0, 0))
            sums[key] = total + wide.sum(1), square + wide.square().sum(1), count + x.shape[1]
    if not sums:
        raise DataError("there are no images to compare features on")
    means, scales, levels = {}, {}, {}
    for key, (total, square, count) in sums.items():
        mean = total / count  # (members, channels)
        scale = (square / count - mean.square()).clamp(min=0).mean().sqrt()
        largest = mean.abs().max()
        if scale <= 1e-6 * largest or scale == 0:  # all of this output stands still
            scale = largest.where(largest > 0, 1)
        means[key], scales[key], levels[key] = mean.float(), scale.float(), (mean / scale).float()
    found: dict[str, Tensor] = {}
    for batch in data:
        for key, x in _outputs(module, states, batch, axes).items():
            x = (x - means[key].to(x)[:, None]) / scales[key].to(x)
            for group, index in standing[key]:
                for slot in index.T:  # a unit's first place with the other's first, …
                    rows = x[:, :, slot].transpose(0, 1).flatten(1)  # (N, members · units)
                    part = rows.T @ rows / sums[key][2]
                    found[group.name] = found[group.name] + part if group.name in found else part
    return {group.name: _normed(found[group.name], torch.stack(
        [levels[site.key][:, slot].flatten() for site in group.sites for slot in site.index.T], 1)
    ).cpu() for group in groups}


def _normed(covariance: Tensor, levels: Tensor) -> Tensor:
    """Correlations of units; levels: their means, [units, outputs]."""
    variance = covariance.diagonal()
    still = variance <= _STILL * (1 + levels.square().amax(1))
    scale = torch.where(still, 0, variance.clamp(min=1e-30).rsqrt())
    near = covariance * scale[:, None] * scale
    apart = torch.cdist(levels[still], levels[still], p=torch.inf)
    near[still[:, None] & still] = (1 - apart).clamp(min=0).flatten().to(near)
    return near


def _outputs(
    module: nn.Module, states: Sequence[State], batch: Tensor, axes: Mapping[str, int]
) -> dict[str, Tensor]:
    """Each watched module's output in each member, [members, images × places, channels]."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, out: Tensor) -> None:
        rows = out.movedim(axes[name], -1).flatten(0, -2)
        found.setdefault(name, []).append(rows[::-(-len(rows) // _ROWS)])

    for state in states:
        watched(module, state, batch, axes, keep)
    # A module that runs more than once in a network is watched each time.
    times = {name: len(rows) // len(states) for name, rows in found.items()}
    return {name: torch.stack([torch.cat(rows[start:start + times[name]])
                               for start in range(0, len(rows), times[name])])
            for name, rows in found.items()}


def _zipped(similarity: Tensor, members: int, alpha: float, beta: float) -> Tensor:
    """Which merged feature each feature becomes a part of, int64 [members · units].

    similarity: correlations [members · units] squared.
    """
    features = len(similarity)
    units = features // members
    near = similarity.clone().fill_diagonal_(-torch.inf)
    part_of = torch.arange(features)
    owner = part_of // units
    parts = owner[:, None] == torch.arange(members)  # of each member in a feature
    twice = torch.zeros(features, dtype=torch.bool)
    budget = torch.full((members,), int((features - units) // members * beta + 1e-4))
    # Pairs of members that may merge no more among their own: last of all, if nothing else is left.
    shut = (owner[:, None] == owner[None]) & (budget == 0)[owner][:, None]
    score = near - _LAST * shut
    top, partner = score.max(1)  # each feature's best, kept up to date
    for _ in range(features - units):
        pick = int(top.argmax())
        one, other = sorted((pick, int(partner[pick])))
        part_of[part_of == other] = one
        # A merged feature is as near to another as the farther one of its parts.
        joint = torch.minimum(near[one], near[other])
        twice[one] |= twice[other] | (parts[one] & parts[other]).any()
        parts[one] |= parts[other]
        again = twice | twice[one] | (parts & parts[one]).any(1)
        late = joint * alpha if alpha > 0 else joint.clamp(max=_LATE)
        joint = late.where(again, joint)
        joint[one] = -torch.inf
        near[one], near[:, one] = joint, joint
        near[other], near[:, other] = -torch.inf, -torch.inf
        shut[one] |= shut[other]
        shut[:, one] |= shut[:, other]
        if owner[one] == owner[other]:
            budget[owner[one]] -= 1
            if budget[owner[one]] == 0:
                same = owner == owner[one]
                shut |= same[:, None] & same[None]
                score = near - _LAST * shut
                partner = torch.full_like(partner, one)  # all are looked at again
        row = near[one] - _LAST * shut[one]
        score[one], score[:, one] = row, row
        score[other], score[:, other] = -torch.inf, -torch.inf
        lost = ((partner == one) | (partner == other)).nonzero()[:, 0]
        top[lost], partner[lost] = score[lost].max(1)
        nearer = row > top
        top, partner = row.where(nearer, top), torch.where(nearer, one, partner)
        top[one], partner[one] = row.max(0)
        top[other] = -torch.inf
    _, places = torch.unique(part_of, return_inverse=True)
    return cast(Tensor, places)


def _across(part_of: Tensor, members: int) -> float:
    """The part of the merged features that have several members' in them."""
    owners = torch.zeros(int(part_of.max()) + 1, members)
    owners[part_of, torch.arange(len(part_of)) * members // len(part_of)] = 1
    return float((owners.sum(1) > 1).float().mean())


def _merged(
    tensors: Sequence[Tensor], places: Sequence[tuple[int, Group, Tensor]],
    zips: Mapping[str, Tensor], share: Sequence[float],
) -> Tensor:
    """One tensor of several, along the axes whose features were merged: outputs are averaged, and
    an input stands for all of its parts. places: axis, group and positions of its units."""
    whole = torch.zeros_like(tensors[0])
    plain = torch.tensor(share, dtype=torch.float64) / sum(share)
    for member, tensor in enumerate(tensors):
        part, averaged = tensor, False
        for axis in sorted({axis for axis, _, _ in places}):
            puts_out = not (axis == 1 and tensor.shape[0] > 1)
            target = torch.arange(tensor.shape[axis])
            factor = torch.full((len(target),), float(plain[member]) if puts_out else 1.0,
                                dtype=torch.float64)
            for _, group, index in (place for place in places if place[0] == axis):
                becomes = zips[group.name].view(len(tensors), -1)[member]  # (units,)
                target[index] = index[becomes]
                if puts_out:
                    factor[index] = _parts(zips[group.name], plain)[member][:, None]
            shape = [-1 if each == axis else 1 for each in range(tensor.dim())]
            part = torch.zeros_like(part).index_add_(
                axis, target.to(part.device), part * factor.to(part).view(shape))
            averaged |= puts_out
        whole += part if averaged else part * float(plain[member])
    return whole


def _parts(part_of: Tensor, share: Tensor) -> Tensor:
    """How much each feature counts in the mean that it becomes a part of, [members, units]."""
    own = share.repeat_interleave(len(part_of) // len(share))
    total = torch.zeros(int(part_of.max()) + 1, dtype=own.dtype).index_add_(0, part_of, own)
    return (own / total.where(total > 0, 1)[part_of]).view(len(share), -1)
