"""Greedy and learned soups: who is taken, what is said of it, and never worse than the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import OptionError
from zoo.fusion.weights.greedy_soup import greedy_soup
from zoo.fusion.weights.learned_soup import learned_soup
from zoo.model import Model

State = Mapping[str, Tensor]


def member(value: float, mean: float = 0.0) -> dict[str, Tensor]:
    return {"w": torch.tensor([value]), "bn.running_mean": torch.tensor([mean]),
            "bn.running_var": torch.ones(1), "bn.num_batches_tracked": torch.tensor(3)}


def near(target: float) -> Callable[[State], float]:
    """A score that is best at one value of the weight."""
    return lambda state: round(-abs(float(state["w"]) - target), 6)


def greedy(
    states: list[dict[str, Tensor]], score: Callable[[State], float],
    share: list[float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    report: dict[str, Any] = {}
    weights = {"w": share or [1.0] * len(states)}
    return greedy_soup(states, weights=weights, score=score, report=report), report


def test_a_greedy_soup_keeps_who_does_no_harm_and_says_why() -> None:
    states = [member(3.0), member(0.5), member(-0.7), member(-0.2)]
    soup, report = greedy(states, near(0.0))
    # From -0.2: with 0.5 it is at 0.15, no worse; with -0.7 at -0.133; with 3.0 far away.
    assert soup["w"].item() == pytest.approx((-0.2 + 0.5 - 0.7) / 3)
    told = [(each["member"], each["kept"]) for each in report["members"]]
    assert told == [(4, True), (2, True), (3, True), (1, False)]
    assert report["members"][1]["score"] == pytest.approx(-0.5)
    assert report["members"][1]["soup"] == pytest.approx(-0.15)
    assert report["members"][3]["soup"] < report["score"] == pytest.approx(-0.133333)


def test_a_greedy_soup_is_the_best_member_where_all_others_harm() -> None:
    soup, report = greedy([member(5.0), member(1.0), member(9.0)], near(0.0))
    assert soup["w"].item() == 1
    assert [each["kept"] for each in report["members"]] == [True, False, False]
    assert soup["bn.num_batches_tracked"].item() == 3


def test_equal_scores_are_no_harm() -> None:
    soup, report = greedy([member(1.0), member(3.0)], lambda state: 0.5)
    assert soup["w"].item() == 2
    assert [each["member"] for each in report["members"]] == [1, 2]


def test_every_candidate_has_its_statistics_pooled() -> None:
    seen: list[tuple[float, float]] = []

    def score(state: State) -> float:
        seen.append((state["bn.running_mean"].item(), state["bn.running_var"].item()))
        return 1.0

    soup, _ = greedy([member(0.0, -2.0), member(1.0, 2.0)], score)
    assert seen == [(-2, 1), (2, 1), (0, 1 + 4)]
    assert soup["bn.running_var"].item() == 5
    soup, _ = greedy([member(0.0, -2.0), member(1.0, 2.0)], lambda state: 1.0, [1.0, 3.0])
    assert soup["w"].item() == 0.75
    assert soup["bn.running_mean"].item() == 1


class Line(nn.Module):
    """Logits (0, b · x) and a batch norm that changes nothing in evaluation at its start."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("zero", torch.zeros(1), persistent=False)  # in no state
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * self.w
        return torch.cat([y * self.zero, y], 1)


def line(value: float, mean: float = 0.0) -> dict[str, Tensor]:
    state = {key: tensor.clone() for key, tensor in Line().state_dict().items()}
    state["w"] = torch.tensor([value])
    state["norm.running_mean"] += mean
    return state


def learned(
    states: list[dict[str, Tensor]], score: Callable[[State], float] = lambda state: 1.0,
    share: list[float] | None = None, **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    data = [torch.randn(50, 1, generator=draw) for _ in range(2)]
    labels = [(batch[:, 0] + 0.5 * torch.randn(50, generator=draw) > 0).long() for batch in data]
    report: dict[str, Any] = {}
    keys = [key for key, tensor in states[0].items()
            if tensor.is_floating_point() and "running" not in key]
    with torch.no_grad():
        soup = learned_soup(
            states, weights={key: tuple(share or [1.0] * len(states)) for key in keys},
            module=Line().eval(), data=data, labels=labels, score=score, report=report, **options)
    return soup, report


def test_shares_go_to_the_member_that_knows() -> None:
    soup, report = learned([line(-3.0), line(3.0), line(-2.0)], epochs=60, lr=0.1)
    assert report["shares"][1] > 0.9
    assert sum(report["shares"]) == pytest.approx(1)
    mixed = sum(share * w for share, w in zip(report["shares"], (-3, 3, -2), strict=True))
    assert soup["w"].item() == pytest.approx(mixed, abs=1e-5)
    assert report["temperature"] != 1
    assert report["won"] == "soup"


def test_the_mixture_has_the_statistics_of_a_mixture() -> None:
    soup, report = learned([line(1.0, 0.0), line(3.0, 4.0)], share=[3.0, 1.0], epochs=0)
    assert report["shares"] == pytest.approx([0.75, 0.25])
    assert soup["w"].item() == pytest.approx(1.5)
    assert soup["norm.running_mean"].item() == pytest.approx(1.0)
    assert soup["norm.running_var"].item() == pytest.approx(1 + 0.75 * 1 + 0.25 * 9)


def test_each_tensor_may_have_shares_of_its_own() -> None:
    states = [line(-3.0), line(3.0)]
    states[0]["norm.bias"] += 0.0
    states[1]["norm.bias"] += 5.0
    soup, _ = learned(states, per="tensor", epochs=60, lr=0.1)
    assert soup["w"].item() > 1.5
    assert soup["norm.bias"].item() < 1.5
    joint, _ = learned(states, epochs=60, lr=0.1)
    assert joint["norm.bias"].item() / 5 == pytest.approx((joint["w"].item() + 3) / 6, abs=1e-4)


def test_a_learned_soup_is_never_worse_than_the_best_member() -> None:
    soup, report = learned([line(-3.0), line(3.0)], score=near(-3.0))
    assert soup["w"].item() == -3
    assert report["won"] == "member 1"
    assert report["scores"]["member 1"] == 0
    assert report["scores"]["member 2"] == -6


def test_nor_than_the_soup_that_it_started_from() -> None:
    soup, report = learned([line(-3.0), line(3.0)], score=near(0.0), epochs=20, lr=0.1)
    assert soup["w"].item() == 0
    assert report["won"] == "start"
    assert report["scores"]["soup"] < report["scores"]["start"] == 0


def test_bad_values() -> None:
    with pytest.raises(OptionError, match=r"learned_soup: epochs is -1 and lr 0.05, expected 0"):
        learned([line(1.0), line(2.0)], epochs=-1)
    with pytest.raises(OptionError, match=r"the weights \(1.0, -1.0\) of .* are no shares"):
        learned([line(1.0), line(2.0)], share=[1.0, -1.0])


def squares() -> TensorDataset:
    """Bright and dark squares, which a network learns in a few epochs."""
    truth = torch.arange(96) % 2
    pixels = 0.4 * torch.rand(96, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(pixels + 0.6 * truth.view(-1, 1, 1, 1), truth)


@cache
def models() -> tuple[Model, Model, Model]:
    """Two that know the classes and one that knows nothing, with batch norm."""
    good, bad = (zoo.backbone("timm/test_resnet", num_classes=2, image_size=32, seed=seed,
                              device="cpu") for seed in (0, 1))
    zoo.transfer(good, squares(), "finetune", epochs=6, lr=1e-2, batch_size=16)
    twin = zoo.fuse([good, good], "average", norms="pooled")
    return bad, good, twin


@pytest.mark.parametrize("name", ["greedy_soup", "learned_soup"])
@pytest.mark.parametrize("norms", ["auto", "pooled", "reestimated"])
def test_with_real_networks_the_bad_member_stays_out(name: str, norms: Any) -> None:
    bad, good, twin = models()
    soup = zoo.fuse([bad, good, twin], name, data=squares(), norms=norms)
    measured, best = (zoo.evaluate(model, squares()).accuracy for model in (soup, good))
    assert measured >= best > 0.95
    report = soup.recipe["report"]
    if name == "greedy_soup":
        assert report["members"][-1]["member"] == 1
        if norms == "pooled":  # new statistics mend even the soup with the bad one, here
            assert [each["kept"] for each in report["members"]] == [True, True, False]
    else:
        assert report["scores"][report["won"]] == max(report["scores"].values())
        assert report["won"] != "member 1"


def test_half_precision_members_are_mixed_in_float32() -> None:
    bad, good, twin = (zoo.fuse([model, model], "average", norms="pooled", dtype="bfloat16")
                       for model in models())
    soup = zoo.fuse([bad, good, twin], "learned_soup", data=squares(), norms="pooled")
    assert next(soup.parameters()).dtype == torch.bfloat16
    assert zoo.evaluate(soup, squares()).accuracy > 0.95
