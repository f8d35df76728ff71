"""Checks of transfer methods, on a small network and small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from zoo.assembly import backbone
from zoo.datasets import load_data
from zoo.errors import TrainingError
from zoo.model import Model
from zoo.options import accepts, checked
from zoo.registry import load
from zoo.specs import TransferSpec
from zoo.store import load as load_model
from zoo.store import save
from zoo.testing.devices import devices
from zoo.testing.options import want_errors_that_name
from zoo.training import Transferred, transfer
from zoo.training.settings import Settings
from zoo.training.streams import Stream
from zoo.transfers.objective import Objective

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


def gradients_reach_what_trains(spec: TransferSpec) -> None:
    """In each of its phases a loss reaches every parameter that the method lets train."""
    model, teachers = _model(), [_model(seed=7)] if "teachers" in spec.uses else []
    target = load_data(_data(1), role="train") if "unlabelled" in spec.uses else None
    for objective in _objectives(spec, model, teachers):
        objective.choose_trained()
        frozen = not objective.trunk and not objective.needs_images
        stream = Stream(model, load_data(_data(0), role="train"), Settings(batch_size=8), target,
                        teachers, frozen=frozen, matched=objective.reads_logits)
        objective.begin(stream.everything_taught())
        objective.train()
        loss = objective(next(stream.epoch(0, 0)))
        assert isinstance(loss, Tensor), (
            f"the loss of {spec.name} is a {type(loss).__name__}; return a tensor of one number")
        assert loss.ndim == 0, (
            f"the loss of {spec.name} has the shape {list(loss.shape)}; return the mean over the "
            "batch, a tensor of one number")
        torch.autograd.backward(loss)
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None or not parameter.requires_grad, (
                f"no gradient reaches {name!r}, which {spec.name} lets train; use it in the loss, "
                "or freeze it in choose_trained()")
        objective.zero_grad()


def trains_in_bfloat16(spec: TransferSpec) -> None:
    """It trains under bfloat16 autocast, with a finite loss."""
    try:
        _transfer(spec, _model(), precision="bfloat16")
    except (RuntimeError, TrainingError) as error:
        raise AssertionError(f"{spec.name} does not train with precision='bfloat16': {error}; "
                             "compute logarithms and divisions in float32, and cast to the dtype "
                             "that you meet") from error


def trains_on_every_device(spec: TransferSpec) -> None:
    """An epoch runs on every device of the machine, and the model stays on it."""
    for device in devices():
        model = _model().to(device)
        teachers = [_model(seed=7).to(device)] if "teachers" in spec.uses else []
        try:
            _transfer(spec, model, teachers=teachers)
        except RuntimeError as error:
            raise AssertionError(f"{spec.name} does not train on {device}: {error}; make tensors "
                                 "on the device of those that you are given") from error
        assert model.device.type == device.type, (
            f"{spec.name} moved the model from {device}; leave it where it is")


def trained_models_save_and_load(spec: TransferSpec) -> None:
    """A trained model has equal logits after zoo.save and zoo.load: what a method brings for the
    training does not stay in the model."""
    model = _model()
    _transfer(spec, model)
    with TemporaryDirectory() as folder, torch.no_grad():
        save(model, Path(folder, "model"))
        loaded = load_model(Path(folder, "model"), device="cpu")
        assert torch.equal(loaded(_images(2)), model(_images(2))), (
            f"a model trained by {spec.name} answers differently after save and load; hang nothing "
            "on the model, bring modules in the objective")


def errors_name_option_and_value(spec: TransferSpec) -> None:
    """A number that an option cannot be is refused by an error that names both, or works."""
    teachers = [_model(seed=7)] if "teachers" in spec.uses else []
    want_errors_that_name(spec, lambda options: _objectives(spec, _model(), teachers, options))


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
        assert torch.equal(tensor, before[key]), (
            f"{spec.name} changed {key!r} of its teacher; read what teachers say from batch.taught")


def learns_without_labels(spec: TransferSpec) -> None:
    """Where the spec says with which options, it trains on images without labels."""
    if not spec.without_labels:
        return
    model = _model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    said = ", ".join(f"{name}={value!r}" for name, value in spec.without_labels.items())
    try:
        _transfer(spec, model, data=TensorDataset(_images(0)), **spec.without_labels)
    except Exception as error:
        raise AssertionError(
            f"{spec.name} with {said} does not train on images without labels: "
            f"{type(error).__name__}: {error}; leave batch.labels, which are -1 then, alone, or "
            "say without_labels={}") from error
    assert any(not torch.equal(tensor, before[key])
               for key, tensor in model.state_dict().items()), (
        f"{spec.name} with {said} learns nothing from images without labels")


def _objectives(
    spec: TransferSpec, model: Model, teachers: Sequence[Model],
    options: Mapping[str, Any] | None = None,
) -> list[Objective]:
    builder = load(spec)
    extra = {"teachers": teachers} if accepts(builder, "teachers") else {}
    built = builder(model, criterion=torch.nn.functional.cross_entropy, **extra,
                    **checked(spec, options or {}))
    return [built] if isinstance(built, Objective) else [phase.objective for phase in built]


def _model(seed: int = 0) -> Model:
    return backbone("zoo/mnist_cnn", num_classes=_CLASSES, image_size=8, seed=seed, device="cpu")


def _transfer(
    spec: TransferSpec, model: Model, *, data: TensorDataset | None = None, **settings: Any
) -> Transferred:
    given: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-2, **settings}
    if "unlabelled" in spec.uses:
        given["unlabelled"] = _data(1)
    if "teachers" in spec.uses:
        given.setdefault("teachers", [_model(seed=7)])
    return transfer(model, data or _data(0), spec.name, **given)


def _data(seed: int) -> TensorDataset:
    return TensorDataset(_images(seed), torch.arange(32) % _CLASSES)


def _images(seed: int) -> Tensor:
    return torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


CHECKS: Sequence[Callable[[TransferSpec], None]] = (
    trains_and_says_so, same_seed_trains_the_same, loss_is_a_mean, teachers_stay_as_they_are,
    gradients_reach_what_trains, trains_in_bfloat16, trains_on_every_device,
    trained_models_save_and_load, errors_name_option_and_value, learns_without_labels,
)
