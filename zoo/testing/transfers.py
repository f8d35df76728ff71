"""Checks of transfer methods, on a small network and small images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from zoo.assembly import backbone
from zoo.model import Model
from zoo.specs import TransferSpec
from zoo.training import Transferred, transfer

_CLASSES = 4


def trains_and_says_so(spec: TransferSpec) -> None:
    """Two epochs run, change the head, keep a history and the model's own mode and gradients."""
    model = _model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    result = _transfer(spec, model)
    assert result.model is model, f"{spec.name} gave another model than the one it was given"
    assert result.history, f"{spec.name} left no history"
    changed = [key for key, tensor in model.state_dict().items()
               if not torch.equal(tensor, before[key])]
    assert changed, f"{spec.name} changed nothing; let the parameters that train require gradients"
    assert all(parameter.requires_grad for parameter in model.parameters()), (
        f"{spec.name} left parameters frozen")


def same_seed_trains_the_same(spec: TransferSpec) -> None:
    """Twice the same transfer gives the same weights."""
    one, other = _model(), _model()
    _transfer(spec, one)
    _transfer(spec, other)
    for key, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), (
            f"{spec.name} trained {key!r} differently the second time; draw random numbers from "
            "torch's generator, which the loop seeds")


def loss_is_a_mean(spec: TransferSpec) -> None:
    """The loss is a finite mean over the batch: twice the batch size, about the same loss."""
    losses = [_transfer(spec, _model(), batch_size=size, lr=1e-12).history[0]["loss"]
              for size in (8, 16)]
    assert all(torch.isfinite(torch.tensor(losses))), f"the loss of {spec.name} is {losses}"
    assert abs(losses[0] - losses[1]) <= 0.25 * max(losses), (
        f"the loss of {spec.name} is {losses[0]:.3f} for batches of 8 and {losses[1]:.3f} for 16; "
        "return the mean over the batch")


def teachers_stay_as_they_are(spec: TransferSpec) -> None:
    """A teacher is never changed."""
    if "teachers" not in spec.uses:
        return
    teacher = _model(seed=7)
    before = {key: tensor.clone() for key, tensor in teacher.state_dict().items()}
    _transfer(spec, _model(), teachers=[teacher])
    for key, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[key]), f"{spec.name} changed {key!r} of its teacher"


def _model(seed: int = 0) -> Model:
    return backbone("zoo/mnist_cnn", num_classes=_CLASSES, image_size=8, seed=seed, device="cpu")


def _transfer(spec: TransferSpec, model: Model, **settings: Any) -> Transferred:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-2, **settings}
    if "unlabelled" in spec.uses:
        given["unlabelled"] = TensorDataset(_images(1), torch.zeros(32, dtype=torch.long))
    if "teachers" in spec.uses:
        given.setdefault("teachers", [_model(seed=7)])
    data = TensorDataset(_images(0), torch.arange(32) % _CLASSES)
    return transfer(model, data, spec.name, **given)


def _images(seed: int) -> Tensor:
    return torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


CHECKS: Sequence[Callable[[TransferSpec], None]] = (
    trains_and_says_so, same_seed_trains_the_same, loss_is_a_mean, teachers_stay_as_they_are,
)
