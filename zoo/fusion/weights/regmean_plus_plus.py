"""RegMean++: Nguyen et al. 2025, "RegMean++: enhancing effectiveness and generalization of
regression mean for model merging", arXiv:2508.03121."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from zoo.fusion.candidates import completed
from zoo.fusion.depth import depths
from zoo.fusion.grams import input_grams, regressed
from zoo.fusion.weighting import want_shares
from zoo.fusion.weights.average import average
from zoo.fusion.weights.regmean import want_damping

State = Mapping[str, Tensor]


def regmean_plus_plus(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
    damping: float = 0.95,
) -> dict[str, Tensor]:
    """RegMean block by block: each member's block is fed by the merged blocks before it.

    Blocks are the network's layers by depth, such as timm's `layer1.0` or `blocks.3`; a network
    whose names tell no depth is one block, and gets what `regmean` gives. As the images are the
    same for all members, so are a block's inputs, and its first layer gets the members' mean: a
    network whose blocks are single layers, such as VGG, is averaged. Takes one pass over the images
    for each block and member. All else as by `regmean`; of the merged blocks, running statistics
    are pooled.

    states: one per member. weights: by key, one number ≥ 0 per member. data: unlabelled images.
    Raises OptionError for a damping outside [0, 1] or a negative weight, DataError without images.
    Nguyen et al. 2025, arXiv:2508.03121.

    Options:
        damping: factor on the off-diagonal entries of a Gram matrix, in [0, 1]; 0.95 in the paper's
            experiments
    """
    want_damping("regmean++", damping)
    want_shares("regmean++", weights)
    fused = {key: average([state[key] for state in states], base=None, key=key, weight=row)
             for key, row in weights.items()}
    depth_of = depths(states[0])
    for depth in sorted(set(depth_of.values())):
        block = [key for key in fused if depth_of[key] == depth and fused[key].dim() > 1]
        if not block:
            continue
        before = completed(fused, states, next(iter(weights.values())))
        fed = [{key: before[key] if depth_of[key] < depth else tensor
                for key, tensor in state.items()} for state in states]
        grams = (input_grams(module, state, block, data) for state in fed)
        fused |= regressed(fused, states, grams, weights, damping)
    return fused
