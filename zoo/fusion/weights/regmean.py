"""RegMean: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models",
arXiv:2212.09849."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from zoo.errors import OptionError
from zoo.fusion.grams import input_grams, regressed
from zoo.fusion.weighting import want_shares
from zoo.fusion.weights.average import average

State = Mapping[str, Tensor]


def regmean(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
    damping: float = 0.9,
) -> dict[str, Tensor]:
    """Each linear layer as the regression onto the members' answers: (Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ.

    Gᵢ = XᵢᵀXᵢ / N of the layer's inputs inside member i, with its off-diagonal entries damped. The
    paper takes inputs from each member's own training data; here they come from the same images for
    all, which says less about who knows what where members know unlike things. Convolutions are
    linear in their patches, grouped ones in each group. All other tensors are averaged: biases,
    norms, embeddings, and layers that compute something else than their weight times their input,
    such as weight-standardised ones. Where no member has any input, the mean stays.

    states: one per member. weights: by key, one number ≥ 0 per member. data: unlabelled images.
    Raises OptionError for a damping outside [0, 1] or a negative weight, DataError without images.
    Jin et al. 2023, arXiv:2212.09849.

    Options:
        damping: factor on the off-diagonal entries of Gᵢ, in [0, 1]; 0.9 to 0.95 is usual, and 1
            takes many images
    """
    want_damping("regmean", damping)
    want_shares("regmean", weights)
    fused = {key: average([state[key] for state in states], base=None, key=key, weight=row)
             for key, row in weights.items()}
    grams = (input_grams(module, state, weights, data) for state in states)
    return {**fused, **regressed(fused, states, grams, weights, damping)}


def want_damping(strategy: str, damping: float) -> None:
    """Raises OptionError for a damping outside [0, 1]."""
    if not 0 <= damping <= 1:
        raise OptionError(strategy, f"damping is {damping}, expected a factor in [0, 1]")
