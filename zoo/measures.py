"""What a list of predictions is worth: pure measures on logits and labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from zoo.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_BINS = 15


def measure(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Every measure of one model on one data set, as plain JSON values.

    logits: [N, C], logits or log-probabilities; labels: integers [N] in 0…C-1; classes: the C
    names. Gives n; accuracy; its 95 % interval [low, high] (Wilson); top5, None unless C > 5;
    nll in nats; ece (15 bins of equal width, Guo et al. 2017, arXiv:1706.04599) and calibration,
    those bins as {n, confidence, accuracy}, None where n is 0; confusion [C][C], rows are true and
    columns predicted classes; and per_class {name: {n, recall, precision}},
    None where a class never occurs or is never predicted.

    Raises DataError when the three do not fit each other, or a logit is not a number.
    """
    from torch.nn import functional

    logits, labels = logits.float().cpu(), labels.cpu()  # (N, C), (N,)
    _check(logits, labels, classes)
    n, c = logits.shape
    predicted = logits.argmax(dim=1)  # (N,)
    correct = predicted == labels  # (N,)
    confusion = (labels * c + predicted).bincount(minlength=c * c).view(c, c)
    right, occurs, called = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)
    bins = _calibration(logits.softmax(dim=1).amax(dim=1), correct)
    in_top5 = (logits.topk(5).indices == labels[:, None]).sum().item() if c > 5 else None
    hits = int(correct.sum())
    return {
        "n": n,
        "accuracy": hits / n,
        "interval": list(wilson(hits, n)),
        "top5": None if in_top5 is None else in_top5 / n,
        "nll": functional.cross_entropy(logits, labels).item(),
        "ece": sum(each["n"] * abs(each["accuracy"] - each["confidence"])
                   for each in bins if each["n"]) / n,
        "calibration": bins,
        "confusion": confusion.tolist(),
        "per_class": {
            name: {"n": count, "recall": hit / count if count else None,
                   "precision": hit / calls if calls else None}
            for name, hit, count, calls in zip(
                classes, right.tolist(), occurs.tolist(), called.tolist(), strict=True)
        },
    }


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval (low, high) that holds the true accuracy with this confidence.

    correct: 0…n of n ≥ 1 answers; confidence: in (0, 1). Raises DataError for impossible counts.
    Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"{correct} of {n} cannot be right; the count is between 0 and n, n ≥ 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = correct / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar(correct_a: Tensor, correct_b: Tensor) -> dict[str, float]:
    """Whether two models that answered the same N questions differ by more than chance.

    correct_a, correct_b: bool [N]. Gives only_a and only_b, the questions that one alone got
    right, and p, the exact two-sided binomial probability of a split this uneven.
    Raises DataError when the two are not equally long. McNemar 1947, doi:10.1007/BF02295996.
    """
    if correct_a.shape != correct_b.shape:
        raise DataError(f"{len(correct_a)} answers cannot be compared with {len(correct_b)}; "
                        "both models must answer the same questions")
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    n = only_a + only_b
    term = tail = 1  # whole numbers: floats would overflow from about a thousand on
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
    return {"only_a": only_a, "only_b": only_b, "p": min(1.0, 2 * tail / 2**n)}


def paired_gain(correct_a: Tensor, correct_b: Tensor, confidence: float = 0.95) -> dict[str, float]:
    """How much more of the same N questions the first model got right than the second.

    correct_a, correct_b: bool [N]. Gives gain, the difference of the accuracies; error, its
    standard error; low and high, its interval. Half an answer is added to each cell of the table of
    right and wrong, so that no error is zero by luck: Agresti 2005, doi:10.1002/sim.1781.
    """
    n = len(correct_a)
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    difference = only_a - only_b
    error = math.sqrt(only_a + only_b + 1 - difference**2 / (n + 2)) / (n + 2)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    middle = difference / (n + 2)
    return {"gain": difference / n, "error": error, "low": max(-1.0, middle - half),
            "high": min(1.0, middle + half)}


def _calibration(confidence: Tensor, correct: Tensor) -> list[dict[str, Any]]:
    """Confidence and accuracy of each of the bins, of equal width on [0, 1]."""
    # The bins are (low, high], so that a confidence of exactly 1 lies in the last of them.
    index = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (N,)
    counts = index.bincount(minlength=CALIBRATION_BINS).tolist()
    sure = index.bincount(confidence.double(), CALIBRATION_BINS).tolist()
    right = index.bincount(correct.double(), CALIBRATION_BINS).tolist()
    return [{"n": n, "confidence": of_sure / n if n else None,
             "accuracy": of_right / n if n else None}
            for n, of_sure, of_right in zip(counts, sure, right, strict=True)]


def _check(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or logits.shape[1] != len(classes):
        raise DataError(f"logits {list(logits.shape)}, labels {list(labels.shape)} and "
                        f"{len(classes)} classes do not fit; expected [N, C], [N] and C")
    if len(labels) == 0:
        raise DataError("there is nothing to measure: no label was given")
    outside = (labels < 0) | (labels >= len(classes))
    if outside.any():
        index = int(outside.nonzero()[0])
        raise DataError(f"item {index} has the label {labels[index].item()}; {len(classes)} "
                        f"classes have the labels 0 to {len(classes) - 1}")
    broken = logits.isnan().any(dim=1)
    if broken.any():
        raise DataError(f"the logits of {int(broken.sum())} of {len(labels)} items are not "
                        f"numbers (nan), first those of item {int(broken.nonzero()[0])}")
