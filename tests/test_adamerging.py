"""AdaMerging: coefficients by least entropy, on unlabelled images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.weights.adamerging import adamerging

State = dict[str, Tensor]


class Two(nn.Module):
    """Logits of two linear layers, one after the other, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.two(self.norm(self.one(x)))
        return logits


def drawn(seed: int, scale: float = 1.0) -> State:
    torch.manual_seed(seed)
    return {key: tensor * scale if tensor.is_floating_point() and "norm" not in key
            else tensor.clone() for key, tensor in Two().state_dict().items()}


def images() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(30, 4, generator=draw) for _ in range(2)]


def fused(
    states: list[State], base: State | None, share: tuple[float, ...] = (1.0, 1.0), **options: Any
) -> tuple[State, dict[str, Any]]:
    weights = {key: share for key in states[0] if key.startswith(("one", "two"))}
    report: dict[str, Any] = {}
    with torch.no_grad():
        result = adamerging(states, base=base, weights=weights, module=Two().eval(),
                            data=options.pop("data", images()), report=report, **options)
    return result, report


def entropy(state: State) -> float:
    net = Two().eval()
    net.load_state_dict({**drawn(0), **state})
    with torch.no_grad():
        logits = net(torch.cat(images()))
    return float(-(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("per", ["tensor", "model"])
def test_the_network_grows_surer(per: str) -> None:
    states, base = [drawn(1, 3.0), drawn(2, 3.0)], drawn(3)
    start, _ = fused(states, base, steps=0)
    found, report = fused(states, base, steps=60, lr=0.02, per=per)
    assert entropy(found) < entropy(start) - 0.05
    assert report["entropy"][1] < report["entropy"][0]
    assert all(0 <= value <= 1 for value in report["coefficients"])
    assert report["coefficients"] != pytest.approx([0.3, 0.3])


def test_without_steps_it_is_task_arithmetic() -> None:
    states, base = [drawn(1), drawn(2)], drawn(3)
    found, report = fused(states, base, (1.0, -2.0), steps=0, start=0.25)
    for key in ("one.weight", "two.bias"):
        expected = base[key] + 0.25 * (states[0][key] - base[key]) - 0.5 * (
            states[1][key] - base[key])
        torch.testing.assert_close(found[key], expected)
    assert report == {"coefficients": [0.25, 0.25], "entropy": []}


def test_one_coefficient_moves_all_tensors_or_each_its_own() -> None:
    states, base = [drawn(1, 3.0)], drawn(3)

    def moved(per: str) -> list[float]:
        found, _ = fused(states, base, (1.0,), steps=12, lr=0.01, per=per)
        return [float((found[key] - base[key]).norm() / (states[0][key] - base[key]).norm())
                for key in ("one.weight", "one.bias", "two.weight")]

    together = moved("model")
    assert together == pytest.approx([together[0]] * 3, rel=1e-4)
    assert len({round(part, 3) for part in moved("tensor")}) == 3


def test_coefficients_stay_between_nothing_and_all() -> None:
    states, base = [drawn(1, 5.0)], drawn(3)
    found, report = fused(states, base, (1.0,), steps=30, lr=1.0)
    assert 0 <= report["coefficients"][0] <= 1
    for key in ("one.weight", "two.weight"):
        part = (found[key] - base[key]) / (states[0][key] - base[key])
        assert part.min() >= -1e-4
        assert part.max() <= 1 + 1e-4


def test_bad_values_no_images_and_no_base() -> None:
    states, base = [drawn(1), drawn(2)], drawn(3)
    with pytest.raises(OptionError, match=r"adamerging: start is 1.5, expected 0 to 1"):
        fused(states, base, start=1.5)
    with pytest.raises(OptionError, match=r"steps is -1 and lr 0.005, expected 0 or more"):
        fused(states, base, steps=-1)
    with pytest.raises(DataError, match="no images to learn the coefficients from"):
        fused(states, base, data=[])
    with pytest.raises(FusionError, match="it starts from a base model, and none is given"):
        fused(states, None)


def test_unlabelled_images_are_enough() -> None:
    base, one, two = (zoo.backbone("zoo/mnist_cnn", num_classes=3, image_size=8, seed=seed,
                                   device="cpu") for seed in range(3))
    pixels = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    made = zoo.fuse([one, two], "adamerging", base=base, data=TensorDataset(pixels), steps=3)
    assert len(made.recipe["report"]["coefficients"]) == 2
    with pytest.raises(FusionError, match="Pass data=, images, kept apart from training and test"):
        zoo.fuse([one, two], "adamerging", base=base)
