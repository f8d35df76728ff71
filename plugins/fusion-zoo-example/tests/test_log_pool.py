"""The logarithmic pool: where its sharpness comes from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from zoo.errors import NotFitted
from zoo_example.log_pool import LogPool


def held_out(sharpness: float) -> tuple[Tensor, Tensor]:
    """Logits [3, 2000, 4] of three members that agree, and labels drawn from the softmax of
    `sharpness` times theirs."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 4, generator=generator)
    labels = torch.multinomial((sharpness * logits).softmax(1), 1, generator=generator)[:, 0]
    return logits.expand(3, -1, -1), labels


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_sharpness_of_the_data_is_found(sharpness: float) -> None:
    pool = LogPool(3, 4)
    pool.fit(*held_out(sharpness))
    assert float(pool.sharpness) == pytest.approx(sharpness, rel=0.15)


def test_no_other_sharpness_is_likelier() -> None:
    logits, labels = held_out(2.0)
    logits = logits + torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(1)) * logits
    pool = LogPool(3, 4)
    pool.fit(logits, labels)
    best, fitted = nll_loss(pool(logits), labels), pool.sharpness.clone()
    for factor in (0.9, 1.1):
        pool.sharpness.copy_(fitted * factor)
        assert nll_loss(pool(logits), labels) > best


def test_what_is_fitted_is_in_the_state() -> None:
    pool, copy = LogPool(3, 4), LogPool(3, 4)
    logits, labels = held_out(2.0)
    with pytest.raises(NotFitted, match="example/log_pool"):
        copy(logits)
    pool.fit(logits, labels)
    copy.load_state_dict(pool.state_dict())
    assert torch.equal(copy(logits), pool(logits))
