"""Batch norm after a fusion of weights: pool the running statistics, or estimate them again.

Ioffe & Szegedy 2015, arXiv:1502.03167; re-estimation as in Izmailov et al. 2018 (SWA),
arXiv:1803.05407. Re-estimating helps networks whose statistics were trained and destroys those
whose statistics were frozen: how the members were trained decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import DataError
from zoo.fusion.precision import widened

MEAN, VARIANCE = "running_mean", "running_var"


def norm_keys(net: nn.Module) -> set[str]:
    """The keys of a network's running means and variances; its counters are not among them."""
    return {key for key, _ in net.named_buffers(remove_duplicate=False)
            if key.rpartition(".")[2] in (MEAN, VARIANCE)}


def pooled_variance(
    means: Sequence[Tensor], variances: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """The variance of a mixture: Σ wᵢ(vᵢ + (mᵢ − m)²), m = Σ wᵢmᵢ, which is more than the mean
    of the variances where the means differ.

    means, variances: one per member, each [C]. weights: each ≥ 0, normalised to one here.
    Returns float32 [C].
    """
    shares = [weight / sum(weights) for weight in weights]
    wide = [widened(mean) for mean in means]
    centre = torch.stack([mean * share for mean, share in zip(wide, shares, strict=True)]).sum(0)
    parts = zip(wide, variances, shares, strict=True)
    return torch.stack([
        (widened(variance) + (mean - centre) ** 2) * share for mean, variance, share in parts
    ]).sum(0)


@torch.no_grad()
def reestimate(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace a network's running statistics by those of these batches, all weighing the same.

    net: takes a batch as its one argument; changed in place. Only its batch norms run in training
    mode, so dropout and drop-path stay off; modes and momenta are put back. batches: images
    [B, ...] on the network's device, training data in evaluation transforms. A network without
    running statistics is left alone. Raises DataError when there is no batch; after any error the
    old statistics are back.
    """
    norms = [module for module in net.modules()
             if isinstance(module, _BatchNorm) and module.running_mean is not None]
    if not norms:
        return
    modes = {module: module.training for module in net.modules()}
    momenta = [norm.momentum for norm in norms]
    old = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    seen = 0
    try:
        net.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.training = True  # not train(), which would wake a dropout inside it
        for batch in batches:
            net(batch)
            seen += 1
        if not seen:
            raise DataError("there is no batch to estimate batch norm's statistics from")
    except BaseException:
        for norm, buffers in zip(norms, old, strict=True):
            for buffer, value in zip(norm.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
