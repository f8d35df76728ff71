"""REPAIR: Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for Interpolation
Repair", arXiv:2211.08403.

Between networks from different basins the activations of an average of weights lose their
variance, layer by layer. REPAIR gives every channel the mean and the deviation back that it has in
the members, interpolated like the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from zoo.errors import DataError, FusionError
from zoo.fusion.align.watching import watched
from zoo.fusion.merging import mixture
from zoo.fusion.norms import MEAN, VARIANCE, norm_keys, reestimate

State = Mapping[str, Tensor]
_EPS = 1e-5  # on variances, as in batch norm
_RUNNING = (MEAN, VARIANCE)


@torch.no_grad()
def repaired(
    module: nn.Module,
    fused: State,
    states: Sequence[State],
    shares: Sequence[float],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """The fused state with the members' statistics of activations.

    In a network with batch norm the running statistics are estimated again, and with members that
    normalise by the statistics of their activations that is all of it: batch norm's scale and
    shift are already interpolated. Where a member's statistics are others, as after training with
    batch norm frozen, its channels leave batch norm with a mean and a deviation of their own, and
    scale and shift are changed so that they have these again. In any other network, every
    convolution and linear layer that has a bias, but for the last that runs, gets the members'
    mean and deviation for each output channel; the correction is folded into its weight and bias.

    module: takes all these states; it is not changed. states: the members, aligned. shares: how
    much of each is in the fusion. batches: inputs [B, ...] of the training data, read once per
    member and once for the fusion. Returns the whole state. Raises DataError when there is no
    batch, FusionError when the network has no layer that could be corrected.
    """
    if norm_keys(module):
        net = copy.deepcopy(module)
        changed = _norms_as_in(module, fused, states, shares, batches)
        net.load_state_dict({**fused, **changed})
        reestimate(net, batches)
        changed |= {key: net.state_dict()[key] for key in norm_keys(net)}
        return {key: changed[key].to(fused[key]) if key in changed else tensor
                for key, tensor in fused.items()}
    layers = _layers(module, fused, batches)
    whole = sum(shares)
    targets = {name: _Statistics() for name in layers}
    for state, share in zip(states, shares, strict=True):
        member = _statistics(module, state, layers, batches)
        for name, target in targets.items():
            target.mean = target.mean + member[name].mean * share / whole
            target.deviation = target.deviation + member[name].deviation * share / whole
    result = dict(fused)
    for name, found in _statistics(module, fused, layers, batches, targets).items():
        weight, bias = result[f"{name}.weight"], result[f"{name}.bias"]
        scale = targets[name].deviation / found.deviation
        rows = scale.view(-1, *[1] * (weight.dim() - 1))
        result[f"{name}.weight"] = (weight * rows).to(weight)
        result[f"{name}.bias"] = ((bias - found.mean) * scale + targets[name].mean).to(bias)
    return result


def shares_of(weights: Mapping[str, Sequence[float]]) -> list[float]:
    """How much of each member is in a fusion whose weights may differ by key."""
    return mixture(torch.tensor([*weights.values()], dtype=torch.float64).mean(0).tolist())


def _norms_as_in(
    module: nn.Module, fused: State, states: Sequence[State], shares: Sequence[float],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Batch norm's scales and shifts for a network that normalises by its activations, so that
    channels have the members' mean and deviation. Where members normalise so too, they stay."""
    norms = {name: layer for name, layer in module.named_modules()
             if isinstance(layer, _BatchNorm) and layer.affine and layer.running_mean is not None}
    changed = {f"{name}.{part}": fused[f"{name}.{part}"].clone()
               for name in norms for part in ("weight", "bias")}
    stretch = {name: torch.zeros(()) for name in norms}
    for state, share in zip(states, shares, strict=True):
        seen = _statistics(module, state, dict.fromkeys(norms, 1), batches, inputs=True)
        for name, norm in norms.items():
            weight, mean, variance = (state[f"{name}.{part}"] for part in ("weight", *_RUNNING))
            own = (variance + norm.eps).sqrt()
            wide = (seen[name].deviation.square() - _EPS + norm.eps).sqrt()
            part = share / sum(shares)
            stretch[name] = stretch[name] + part * wide / own
            changed[f"{name}.bias"] += part * weight * (seen[name].mean - mean) / own
    for name in norms:
        changed[f"{name}.weight"] *= stretch[name]
    return changed


@dataclass
class _Statistics:
    """Mean and deviation [C], averaged over batches."""

    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    deviation: Tensor = field(default_factory=lambda: torch.zeros(()))


def _layers(module: nn.Module, state: State, batches: Iterable[Tensor]) -> dict[str, int]:
    """The layers to correct in the order in which they run, and the axis of their channels."""
    axes = {name: 1 if isinstance(layer, _ConvNd) else -1
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and layer.bias is not None}
    order: dict[str, int] = {}

    def see(name: str, out: Tensor) -> None:
        order.pop(name, None)
        order[name] = axes[name]

    watched(module, state, _first(batches), axes, see)
    if len(order) < 2:
        raise FusionError("repair", "the network has no batch norm, and no convolution or linear "
                          "layer with a bias before its last")
    order.popitem()
    return order


def _first(batches: Iterable[Tensor]) -> Tensor:
    for batch in batches:
        return batch
    raise DataError("there is no batch to take statistics of activations from")


def _statistics(
    module: nn.Module, state: State, layers: Mapping[str, int], batches: Iterable[Tensor],
    targets: Mapping[str, _Statistics] | None = None, *, inputs: bool = False,
) -> dict[str, _Statistics]:
    """The statistics of each layer's output (or input); with targets, each is corrected batch by
    batch before the next layer sees it, as batch norm in training would."""
    means: dict[str, list[Tensor]] = {name: [] for name in layers}
    variances: dict[str, list[Tensor]] = {name: [] for name in layers}

    def see(name: str, out: Tensor) -> Tensor | None:
        axis = layers[name]
        others = [dim for dim in range(out.dim()) if dim != axis % out.dim()]
        variance, mean = (each.double() for each in torch.var_mean(out, others, correction=0))
        means[name].append(mean)
        variances[name].append(variance)
        if targets is None:
            return None
        rows = out.movedim(axis, -1)
        scale = targets[name].deviation / (variance + _EPS).sqrt()
        corrected = (rows - mean) * scale + targets[name].mean
        return corrected.to(out.dtype).movedim(-1, axis)

    for batch in batches:
        watched(module, state, batch, layers, see, inputs=inputs)
    return {name: _Statistics(torch.stack(means[name]).mean(0),
                              (torch.stack(variances[name]).mean(0) + _EPS).sqrt())
            for name in layers}
