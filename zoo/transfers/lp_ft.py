"""Probe first, then fine-tune.

Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", arXiv:2202.10054.
"""

from __future__ import annotations

from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.objective import Criterion, Norms, Objective, Phase


def lp_ft(
    model: Model,
    *,
    criterion: Criterion,
    probe: float = 0.5,
    lr_scale: float = 0.1,
    norms: Norms = "auto",
) -> list[Phase]:
    """Train the head on frozen features, then everything at a smaller learning rate, so that a
    random head does not distort the features.

    Options:
        probe: share of the epochs for the head alone, in (0, 1)
        lr_scale: learning rate of the second part relative to the first
        norms: batch norm in the second part: train it, keep it frozen, or (auto) frozen if
            pretrained
    """
    if not 0 < probe < 1:
        raise OptionError("zoo/lp_ft", f"the option 'probe' is {probe}, expected a share in (0, 1)")
    return [
        Phase(Objective(model, criterion, trunk=False), share=probe),
        Phase(Objective(model, criterion, norms=norms), share=1 - probe, lr_scale=lr_scale),
    ]
