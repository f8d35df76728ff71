"""Choosing among candidates: halving, folds, limits, and which gain counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.choosing import (
    Answered,
    Rung,
    Seconds,
    Trials,
    deal,
    decide,
    halve,
    in_words,
    rungs,
)
from zoo.errors import DataError
from zoo.measures import paired_gain


def answered(name: str, wrong: range, rank: int, images: int = 200, toll: float = 0.0) -> Answered:
    """A candidate that gets these images wrong."""
    correct = torch.ones(images, dtype=torch.bool)
    correct[list(wrong)] = False
    return Answered(name, correct, 0.5, rank, toll)


def folds(images: int = 200) -> Tensor:
    return torch.arange(images) % 5


SINGLE = answered("single", range(40), 0)


def test_rungs_grow_in_images_and_where_there_are_few_in_epochs() -> None:
    assert rungs(9000, 20) == [Rung(1000, 20), Rung(3000, 20), Rung(9000, 20)]
    few = rungs(300, 60)
    assert [rung.images for rung in few] == [256, 256, 300]
    assert few[0].epochs < few[1].epochs < few[2].epochs == 60
    assert rungs(30, 5) == [Rung(30, 5)]


def test_the_better_third_of_each_kind_goes_on() -> None:
    tried: list[tuple[str, int]] = []

    def attempt(name: str, rung: Rung) -> tuple[float, float]:
        tried.append((name, rung.images))
        return float(name[1:]), 0.0

    names = [f"a{n}" for n in range(9)] + [f"b{n}" for n in range(100, 103)]
    halve(names, rungs(9000, 1), attempt, Trials(99), kind=lambda name: name[0])
    assert [name for name, images in tried if images == 3000] == ["b102", "b101", "a8", "a7", "a6"]
    assert {name for name, images in tried if images == 9000} == {"a8", "a7", "b102", "b101"}


def test_what_fails_does_not_go_on() -> None:
    tried: list[str] = []

    def attempt(name: str, rung: Rung) -> tuple[float, float] | None:
        tried.append(name)
        return None if name == "bad" else (1.0, 0.0)

    halve(["bad", "good"], rungs(9000, 1), attempt, Trials(9))
    assert tried.count("bad") == 1
    assert tried.count("good") == 3


def test_trials_count_candidates() -> None:
    tried: set[int] = set()

    def attempt(number: int, rung: Rung) -> tuple[float, float]:
        tried.add(number)
        return 1.0, 0.0

    halve(range(50), rungs(500, 1), attempt, Trials(7))
    assert tried == set(range(7))


def test_seconds_end_each_rung_and_leave_one_candidate_in_it() -> None:
    now = 0.0
    tried: list[tuple[int, int]] = []

    def attempt(number: int, rung: Rung) -> tuple[float, float]:
        nonlocal now
        now += 4.0
        tried.append((number, rung.images))
        return -float(number), 0.0

    halve(range(50), rungs(9000, 1), attempt, Seconds(40.0, lambda: now))
    # 4 candidates until 14 seconds; those that go on are expected to take 12 and do not fit, so
    # that one of them is tried.
    assert [len([one for one in tried if one[1] == images]) for images in (1000, 3000, 9000)] == [
        4, 1, 1]
    tried.clear()
    now = 0.0
    halve(range(50), rungs(9000, 1), attempt, Seconds(1.0, lambda: now))
    assert [images for _, images in tried] == [1000, 3000, 9000]


def test_what_would_take_longer_than_is_left_is_not_begun() -> None:
    now = 0.0
    tried: list[tuple[str, int]] = []

    def attempt(name: str, rung: Rung) -> tuple[float, float]:
        nonlocal now
        now += rung.images / (500 if name == "slow" else 9000)
        tried.append((name, rung.images))
        return 1.0 if name == "slow" else 0.0, 0.0

    halve(["slow", "quick"], rungs(9000, 1), attempt, Seconds(16.0, lambda: now))
    assert [name for name, images in tried if images == 3000] == ["slow", "quick"]
    assert [name for name, images in tried if images == 9000] == ["quick"]


def test_every_beginning_and_every_fold_has_every_class() -> None:
    labels = torch.cat([torch.zeros(60), torch.ones(30), torch.full((10,), 2.0)]).long()
    order, fold = deal(labels, 5, seed=1)
    assert sorted(order.tolist()) == list(range(100))
    assert labels[order[:20]].bincount(minlength=3).tolist() == [12, 6, 2]
    for number in range(5):
        assert labels[fold == number].bincount(minlength=3).tolist() == [12, 6, 2]
    again, _ = deal(labels, 5, seed=1)
    other, _ = deal(labels, 5, seed=2)
    assert torch.equal(order, again)
    assert not torch.equal(order, other)


def test_classes_in_turn_do_not_end_up_in_one_fold() -> None:
    labels = torch.arange(100) % 10
    order, fold = deal(labels, 5, seed=0)
    assert labels[order[:50]][fold[order[:50]] == 0].unique().numel() == 10


def test_too_few_images_cannot_be_chosen_on() -> None:
    with pytest.raises(DataError, match=r"5-fold cross-validation, and 8 images are too few.*20"):
        deal(torch.zeros(8).long(), 5, seed=0)


def test_a_clear_gain_is_taken() -> None:
    fused = answered("fused", range(10), 4)
    decision = decide([SINGLE, fused], folds(), 1.0)
    assert decision.chosen is decision.leader is fused
    assert decision.nested == pytest.approx(0.15)
    told = in_words(decision, 2, 1.0)
    assert "15.0 points more than the best single member, single" in told
    assert "nothing simpler" in told


def test_a_gain_of_noise_is_not() -> None:
    lucky = answered("lucky", range(3, 42), 4)  # three more right, two more wrong
    decision = decide([SINGLE, lucky], folds(), 1.0)
    assert decision.leader is lucky
    assert decision.chosen is SINGLE
    assert "is what chance does" in in_words(decision, 2, 1.0)
    assert decide([SINGLE, lucky], folds(), 0.0).chosen is lucky


def test_of_equals_the_simplest_is_taken_and_of_its_like_the_best() -> None:
    best = answered("concat", range(10), 4)
    near, nearest = answered("mean", range(12), 2), answered("vote", range(11), 2)
    assert decide([best, near, nearest, SINGLE], folds(), 2.0).chosen is nearest
    assert decide([best, near, nearest, SINGLE], folds(), 0.0).chosen is best


def test_never_below_the_best_single_member() -> None:
    # What is wrong elsewhere than the leader is within its larger error, and below the member.
    leader, single = answered("leader", range(10), 4), answered("single", range(20), 0)
    other = answered("other", range(100, 124), 1)
    assert decide([leader, single, other], folds(), 2.9).chosen is leader
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        found = [Answered(str(rank), torch.rand(40, generator=generator) < 0.7, 1.0, rank)
                 for rank in (0, 0, 1, 2, 3, 4)]
        decision = decide(found, folds(40), 3.0)
        assert decision.chosen.accuracy >= max(found[0].accuracy, found[1].accuracy)


def test_a_toll_can_turn_the_choice() -> None:
    fused = answered("fused", range(10), 4)
    assert decide([SINGLE, fused], folds(), 1.0).chosen is fused
    dear = answered("fused", range(10), 4, toll=0.2)
    decision = decide([SINGLE, dear], folds(), 1.0)
    assert decision.chosen is decision.leader is SINGLE
    assert "No fusion is better than this single member after its cost" in in_words(
        decision, 2, 1.0, penalised=True)


def test_choosing_that_does_not_stand_on_other_folds_is_not_believed() -> None:
    # Each fusion is perfect in all folds but one, and all wrong there: whoever has not seen that
    # fold takes it.
    fold = folds()
    good = [Answered(f"f{number}", fold != number, 0.1, 4) for number in range(5)]
    single = Answered("single", torch.arange(200) % 10 < 5, 0.1, 0)
    decision = decide([single, *good], fold, 1.0)
    assert decision.doubted
    assert decision.chosen is single
    assert decision.nested < 0
    assert "But choosing like this on some folds loses" in in_words(decision, 6, 1.0)


def test_paired_gain_is_agresti_and_mins() -> None:
    one = torch.tensor([True] * 30 + [False] * 10)
    other = torch.tensor([True] * 20 + [False] * 10 + [True] * 4 + [False] * 6)
    gain = paired_gain(one, other)
    assert gain["gain"] == pytest.approx(6 / 40)
    assert gain["error"] == pytest.approx((15 - 36 / 42) ** 0.5 / 42)
    assert gain["low"] == pytest.approx(6 / 42 - 1.959964 * gain["error"])
    assert gain["high"] == pytest.approx(6 / 42 + 1.959964 * gain["error"])
