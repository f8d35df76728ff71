from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

import zoo
from zoo.datasets import ImageData
from zoo.errors import DataError, OptionError, UnknownName, ZooError
from zoo.evaluation import evaluate, predict
from zoo.model import Model

CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Three classes that differ a little in one colour each."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(30, 3, 8, 8, generator=generator) * 0.9
    labels = torch.arange(30) % 3
    pixels[torch.arange(30), labels] += 0.1
    return ImageData(pixels, labels, CLASSES)


@pytest.fixture(scope="module")
def model(data: ImageData) -> Model:
    model = zoo.backbone("mnist_cnn", classes=CLASSES, image_size=8, device="cpu", seed=0)
    return zoo.transfer(model, data, epochs=8, lr=0.003).model


def test_measures_are_those_of_the_logits(model: Model, data: ImageData) -> None:
    model.train()
    result = evaluate(model, data, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(data.batch(range(30))[0])
    assert result.n == 30
    assert torch.equal(result.predictions, logits.argmax(1))
    assert result.accuracy == pytest.approx((logits.argmax(1) == data.labels).float().mean().item())
    assert result.correct.sum().item() == round(result.accuracy * 30)
    assert result.nll == pytest.approx(functional.cross_entropy(logits, data.labels).item(), 1e-5)
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.robust is None
    assert torch.allclose(predict(model, data), logits, atol=1e-5)


def test_fewer_classes_in_another_order(model: Model, data: ImageData) -> None:
    assert data.labels is not None
    kept = (data.labels != 1).nonzero()[:, 0]
    images = data.batch(kept)[0]
    labels = [1 if label == 0 else 0 for label in data.labels[kept].tolist()]
    result = evaluate(model, ImageData(images, labels, ("c", "a")))
    whole = evaluate(model, data)
    assert torch.equal(result.correct, whole.correct[kept])


def test_attacks(model: Model, data: ImageData) -> None:
    options = {"fgsm": {"eps": 0.1}, "pgd": {"eps": 0.3, "steps": 5}}
    result = evaluate(model, data, attacks=options, batch_size=11)
    assert result.attacks["pgd"]["options"] == options["pgd"]
    assert result.attacks["fgsm"]["zero_gradients"] == 0
    low, high = result.attacks["pgd"]["interval"]
    assert low <= result.attacks["pgd"]["accuracy"] <= high
    assert result.robust is not None
    assert result.robust <= min(result.accuracy, *(a["accuracy"] for a in result.attacks.values()))
    assert result.attacks["pgd"]["accuracy"] < result.accuracy
    nothing = evaluate(model, data, attacks={"fgsm": {"eps": 0.0}})
    assert nothing.attacks["fgsm"]["accuracy"] == nothing.robust == nothing.accuracy


def test_random_starts_follow_the_seed(model: Model, data: ImageData) -> None:
    def gone(seed: int) -> float:
        attack = {"pgd": {"eps": 0.3, "steps": 1, "step_size": 0.001}}
        return float(evaluate(model, data, attacks=attack, seed=seed).attacks["pgd"]["accuracy"])

    accuracies = [gone(seed) for seed in range(6)]
    assert accuracies == [gone(seed) for seed in range(6)]
    assert len(set(accuracies)) > 1


def test_json(model: Model, data: ImageData) -> None:
    told = evaluate(model, data, attacks={"fgsm": {"eps": 0.1}}).as_dict()
    assert json.loads(json.dumps(told)) == told
    assert "correct" not in told


def test_what_is_refused(model: Model, data: ImageData) -> None:
    with pytest.raises(ZooError, match=r"evaluate measures a zoo.Model, and 'mnist_cnn' is not "
                                       "one; load it first"):
        evaluate("mnist_cnn", data)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="no attack is called 'pdg'; did you mean 'pgd'"):
        evaluate(model, data, attacks={"pdg": {}})
    with pytest.raises(OptionError, match="the option 'eps' must be given"):
        evaluate(model, data, attacks="pgd")
    with pytest.raises(DataError, match="no labels"):
        evaluate(model, data.without_labels())
    with pytest.raises(DataError, match="a class 'd' that is not among the 3 classes"):
        evaluate(model, ImageData(torch.rand(1, 3, 8, 8), [0], ["d"]))
