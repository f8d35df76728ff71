"""Update a network from the fused model that it is a part of.

The loss is that of Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
arXiv:1503.02531; a student that is its teacher's equal and gains by it: Furlanello et al. 2018,
"Born-Again Neural Networks", arXiv:1805.04770.
"""

from __future__ import annotations

from collections.abc import Sequence

from zoo.model import Model
from zoo.transfers.distill import Distillation, shares_of, want_mixture
from zoo.transfers.objective import Criterion, Norms, Objective


def self_distill(
    model: Model,
    *,
    criterion: Criterion,
    teachers: Sequence[Model],
    temperature: float = 4.0,
    alpha: float = 0.7,
    norms: Norms = "auto",
) -> Objective:
    """Train a member further on the labels and on what its fused model answers: it is trained
    already, so that the labels weigh more than in `distill`.

    Options:
        temperature: T > 0, which softens teachers and student alike; the term is scaled by T²
        alpha: weight of the teachers' term in [0, 1]; the labels have the rest, and with 1 the
            images need none
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    want_mixture("zoo/self_distill", teachers, temperature, alpha)
    return Distillation(model, criterion, temperature=temperature, alpha=alpha,
                        shares=shares_of("zoo/self_distill", None, len(teachers)), norms=norms)
