from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import OptionError
from zoo.training.losses import criterion

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
LABELS = torch.tensor([0, 1])


def by_hand(name: str, smoothing: float) -> float:
    """Every term written out."""
    total = 0.0
    for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True):
        wanted = [smoothing / 3 + (1 - smoothing) * (k == label) for k in range(3)]
        z = sum(math.exp(x) for x in row)
        p = [math.exp(x) / z for x in row]
        if name == "bce":
            s = [1 / (1 + math.exp(-x)) for x in row]
            total -= sum(w * math.log(q) + (1 - w) * math.log(1 - q)
                         for w, q in zip(wanted, s, strict=True)) / 3
            continue
        loss = -sum(w * math.log(q) for w, q in zip(wanted, p, strict=True))
        total += loss * ((1 - p[label]) ** 2 if name == "focal" else 1)
    return total / 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["cross_entropy", "focal", "bce"])
def test_by_hand(name: str, smoothing: float) -> None:
    loss = criterion(name, smoothing)(LOGITS, LABELS)
    assert loss.item() == pytest.approx(by_hand(name, smoothing), rel=1e-5)


def test_unknown_loss() -> None:
    with pytest.raises(OptionError, match=r"no loss is called 'bse'; did you mean 'bce'\?; its "
                                          "options are cross_entropy, focal, bce"):
        criterion("bse")


def test_smoothing_out_of_range() -> None:
    with pytest.raises(OptionError, match=r"label_smoothing is 1.0, expected \[0, 1\)"):
        criterion("focal", 1.0)
