from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import binomtest
from torch.nn import functional

from zoo.errors import DataError
from zoo.measures import mcnemar, measure, wilson


def test_measures_of_four_answers_by_hand() -> None:
    """a: two of two right (0.9, 0.6); b: one asked, a said (0.6); c: never asked, said once."""
    probabilities = torch.tensor([
        [0.90, 0.05, 0.05], [0.60, 0.30, 0.10], [0.60, 0.30, 0.10], [0.20, 0.20, 0.60],
    ])
    found = measure(probabilities.log(), torch.tensor([0, 0, 1, 1]), ["a", "b", "c"])
    # (0.8667, 0.9333] holds one answer, right at 0.9; (0.5333, 0.6] holds three, one right at 0.6.
    assert found.pop("ece") == pytest.approx((1 * abs(1 - 0.9) + 3 * abs(1 / 3 - 0.6)) / 4)
    asked = [each for each in found.pop("calibration") if each["n"]]
    assert asked == [pytest.approx({"n": 3, "confidence": 0.6, "accuracy": 1 / 3}),
                     pytest.approx({"n": 1, "confidence": 0.9, "accuracy": 1})]
    assert found.pop("nll") == pytest.approx(
        -(math.log(0.9) + math.log(0.6) + math.log(0.3) + math.log(0.2)) / 4)
    assert found.pop("interval") == pytest.approx([0.1500390, 0.8499610], abs=1e-6)
    assert found == {
        "n": 4,
        "accuracy": 0.5,
        "top5": None,
        "confusion": [[2, 0, 0], [1, 0, 1], [0, 0, 0]],
        "per_class": {
            "a": {"n": 2, "recall": 1.0, "precision": 2 / 3},
            "b": {"n": 2, "recall": 0.0, "precision": None},
            "c": {"n": 0, "recall": None, "precision": 0.0},
        },
    }


def test_a_confidence_of_one_lies_in_the_last_bin() -> None:
    """One wrong at 1.0 and one right at 0.97 share a bin, so that their gaps make up for it."""
    probabilities = torch.tensor([[1.0, 0.0], [0.97, 0.03]])
    found = measure(probabilities.log(), torch.tensor([1, 0]), ["a", "b"])
    assert found["ece"] == pytest.approx(abs(0.5 - 0.985))
    assert found["calibration"][-1] == pytest.approx({"n": 2, "confidence": 0.985, "accuracy": 0.5})
    assert found["calibration"][:-1] == [{"n": 0, "confidence": None, "accuracy": None}] * 14


def test_top5_counts_the_label_among_the_five_largest() -> None:
    logits = torch.arange(6.0).repeat(6, 1)
    found = measure(logits, torch.arange(6), list("abcdef"))
    assert (found["top5"], found["accuracy"]) == (5 / 6, 1 / 6)


def test_many_answers_agree_with_torchmetrics() -> None:
    from torchmetrics.functional import classification as reference

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (2000,), generator=generator)
    logits = 2 * torch.randn(2000, 10, generator=generator) + 3 * functional.one_hot(labels, 10)
    found = measure(logits, labels, list("abcdefghij"))
    json.dumps(found, allow_nan=False)
    assert found["ece"] == pytest.approx(
        reference.multiclass_calibration_error(logits, labels, 10, n_bins=15).item(), abs=1e-6)
    assert found["top5"] == pytest.approx(reference.multiclass_accuracy(
        logits, labels, 10, top_k=5, average="micro").item())
    assert found["confusion"] == reference.multiclass_confusion_matrix(logits, labels, 10).tolist()
    for average, key in ((reference.multiclass_recall, "recall"),
                         (reference.multiclass_precision, "precision")):
        assert [row[key] for row in found["per_class"].values()] == pytest.approx(
            average(logits, labels, 10, average="none").tolist())


def test_logits_and_log_probabilities_measure_the_same() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(50) % 6
    from_logits = measure(logits, labels, list("abcdef"))
    from_log_probabilities = measure(logits.log_softmax(1), labels, list("abcdef"))
    for key in ("nll", "ece"):
        assert from_logits.pop(key) == pytest.approx(from_log_probabilities.pop(key), rel=1e-5)
    bins, others = from_logits.pop("calibration"), from_log_probabilities.pop("calibration")
    assert [each["n"] for each in bins] == [each["n"] for each in others]
    assert from_logits == from_log_probabilities


@pytest.mark.parametrize(("logits", "labels", "message"), [
    (torch.zeros(3, 2), torch.tensor([0, 2, 1]),
     "item 1 has the label 2; 2 classes have the labels 0 to 1"),
    (torch.zeros(1, 2), torch.tensor([-1]), "item 0 has the label -1"),
    (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "there is nothing to measure"),
    (torch.tensor([[0.0, 0.0], [math.nan, 0.0]]), torch.tensor([0, 0]),
     r"the logits of 1 of 2 items are not numbers \(nan\), first those of item 1"),
    (torch.zeros(1, 3), torch.tensor([0]), r"logits \[1, 3\], labels \[1\] and 2 classes do not"),
    (torch.zeros(2, 2), torch.tensor([0]), r"logits \[2, 2\], labels \[1\] and 2 classes do not"),
])
def test_what_does_not_fit_is_refused(
    logits: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        measure(logits, labels, ["a", "b"])


@pytest.mark.parametrize(("correct", "n"), [(0, 20), (7, 20), (20, 20), (9_123, 10_000)])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_wilson_agrees_with_scipy(correct: int, n: int, confidence: float) -> None:
    expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    assert wilson(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{correct} of {n} cannot be right"):
        wilson(correct, n)


@pytest.mark.parametrize(("only_a", "only_b", "both"), [
    (0, 0, 5), (3, 3, 0), (1, 8, 4), (8, 1, 4), (4_800, 5_200, 0), (0, 3_000, 7_000),
])
def test_mcnemar_agrees_with_the_binomial_test(only_a: int, only_b: int, both: int) -> None:
    a = torch.tensor([True] * only_a + [False] * only_b + [True] * both)
    b = torch.tensor([False] * only_a + [True] * only_b + [True] * both)
    n = only_a + only_b
    expected = binomtest(only_a, n).pvalue if n else 1.0
    assert mcnemar(a, b) == {
        "only_a": only_a, "only_b": only_b, "p": pytest.approx(expected, rel=1e-9)}


def test_mcnemar_refuses_different_questions() -> None:
    with pytest.raises(DataError, match="3 answers cannot be compared with 1"):
        mcnemar(torch.ones(3, dtype=torch.bool), torch.ones(1, dtype=torch.bool))
