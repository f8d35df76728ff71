"""Classifiers are aligned by label name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion.heads import align_base, align_heads, join_heads

KEYS = {"fc.weight", "fc.bias"}


def state(rows: list[float]) -> dict[str, Tensor]:
    return {"conv": torch.ones(2), "fc.weight": torch.tensor(rows)[:, None] * torch.ones(2),
            "fc.bias": torch.tensor(rows)}


def test_rows_follow_the_first_members_labels() -> None:
    states = [state([1, 2, 3]), state([30, 10, 20])]
    first, second = align_heads(states, [("a", "b", "c"), ("c", "a", "b")], KEYS, strategy="ties")
    assert first["fc.bias"] is states[0]["fc.bias"]
    assert second["fc.bias"].tolist() == [10, 20, 30]
    assert second["fc.weight"].tolist() == [[10, 10], [20, 20], [30, 30]]
    assert second["conv"] is states[1]["conv"]
    assert states[1]["fc.bias"].tolist() == [30, 10, 20]


def test_each_label_is_the_mean_of_the_members_that_know_it() -> None:
    labels, joined = join_heads([state([1.0, 2.0]), state([10.0, 20.0, 30.0])],
                                [("a", "b"), ("b", "c", "a")], KEYS, strategy="ties")
    assert labels == ("a", "b", "c")
    assert joined["fc.bias"].tolist() == [15.5, 6, 20]
    assert joined["fc.weight"].tolist() == [[15.5] * 2, [6] * 2, [20] * 2]
    with pytest.raises(ShapeMismatch, match="has 2 rows for 3 labels"):
        join_heads([state([1, 2])], [("a", "b", "c")], KEYS, strategy="ties")


def test_other_labels_are_refused_by_name() -> None:
    with pytest.raises(FusionError) as error:
        align_heads([state([1, 2, 3]), state([1, 2, 3])], [("a", "b", "c"), ("a", "b", "d")], KEYS,
                    strategy="ties")
    assert str(error.value) == (
        "ties cannot fuse these members: their labels differ: only member 1 knows 'c'; only "
        "member 2 knows 'd'. 'concat' and 'gated' (features) learn a new classifier for members "
        "of any classes; 'mean' and 'stacking' (outputs), and of weights 'average', 'ties' and "
        "what else needs tensors alone, join them by label name")
    many = tuple(map(str, range(9)))
    with pytest.raises(FusionError, match=r"only member 1 knows '0', '1', '2' and 6 more\. "):
        align_heads([state([1.0] * 9), state([])], [many, ()], KEYS, strategy="ties")


def test_labels_that_repeat_cannot_be_reordered() -> None:
    twice = ("crane", "crane", "cat")
    states = [state([1, 2, 3]), state([1, 2, 3])]
    assert align_heads(states, [twice, twice], KEYS, strategy="ties")[1] == states[1]
    with pytest.raises(FusionError, match=r"the label 'crane' names several classes and .* Give "
                       "each class its own name"):
        align_heads(states, [twice, ("crane", "cat", "crane")], KEYS, strategy="ties")


def test_each_row_needs_a_label() -> None:
    with pytest.raises(ShapeMismatch, match=r"'fc.bias' has 2 rows for 3 labels\. Give each memb"):
        align_heads([state([1, 2])], [("a", "b", "c")], ["fc.bias"], strategy="ties")


def test_a_base_with_the_same_labels_is_aligned() -> None:
    base, averaged = align_base(state([2, 1]), ("b", "a"), ("a", "b"), KEYS, strategy="ties")
    assert base["fc.bias"].tolist() == [1, 2]
    assert averaged == frozenset()


def test_a_base_with_other_labels_loses_its_head() -> None:
    base, averaged = align_base(state([2, 1, 0]), ("x", "y", "z"), ("a", "b"), KEYS,
                                strategy="ties")
    assert list(base) == ["conv"]
    assert averaged == KEYS
