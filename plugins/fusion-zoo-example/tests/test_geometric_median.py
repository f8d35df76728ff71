"""The geometric median: where it lies, and what a bad member does to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import OptionError
from zoo_example.geometric_median import geometric_median


def median(points: list[Tensor], weight: list[float] | None = None, **options: Any) -> Tensor:
    return geometric_median(points, base=None, key="fc.weight",
                            weight=weight or [1.0] * len(points), **options)


def test_the_pulls_of_the_members_cancel() -> None:
    points = list(torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)))
    weight = [1.0, 2.0, 1.0, 0.5, 1.0]
    middle = median(points, weight, steps=200)
    pulls = [w * (point - middle) / (point - middle).norm()
             for point, w in zip(points, weight, strict=True)]
    assert torch.stack(pulls).sum(0).norm() < 1e-3


def test_on_a_line_it_is_the_median() -> None:
    points = [torch.tensor(value) for value in (0.0, 1.0, 100.0)]
    assert float(median(points, steps=200)) == pytest.approx(1, abs=1e-3)


def test_without_steps_it_is_the_mean() -> None:
    points = [torch.tensor([0.0, 3.0]), torch.tensor([3.0, 0.0])]
    assert torch.allclose(median(points, [1.0, 2.0], steps=0), torch.tensor([2.0, 1.0]))


def test_a_broken_member_does_not_break_the_model() -> None:
    good = zoo.backbone("zoo/mnist_cnn", num_classes=10, seed=0)
    states = [good.state_dict() for _ in range(3)]
    near, broken = (zoo.backbone("zoo/mnist_cnn", num_classes=10, seed=0) for _ in range(2))
    near.load_state_dict({key: tensor + 1e-3 for key, tensor in states[1].items()})
    broken.load_state_dict({key: tensor * -1e3 for key, tensor in states[2].items()})
    robust = zoo.fuse([good, near, broken], "example/geometric_median")
    for key, tensor in robust.state_dict().items():
        assert torch.allclose(tensor, states[0][key], atol=2e-3)


@pytest.mark.parametrize(("weight", "options", "message"), [
    ([1.0, -1.0], {}, "'fc.weight' are \\[1.0, -1.0\\], expected none below 0"),
    ([0.0, 0.0], {}, "at least one above"),
    ([1.0, 1.0], {"steps": -1}, "steps is -1"),
    ([1.0, 1.0], {"smoothing": 0.0}, "smoothing 0.0"),
])
def test_what_cannot_be_is_refused(
    weight: list[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        median([torch.zeros(2), torch.ones(2)], weight, **options)
