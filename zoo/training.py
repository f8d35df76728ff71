"""One training loop for every transfer method.

A method says what trains and what the loss of a batch is (an `Objective`); the loop is Accelerate's
for devices and processes, timm's for optimisers, schedules and augmentation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.checkpoints import Checkpoint
from zoo.datasets import ImageData, load_data
from zoo.device import resolve_dtype
from zoo.errors import OptionError, TrainingError
from zoo.losses import criterion
from zoo.measures import measure
from zoo.model import Model
from zoo.options import accepts, checked
from zoo.progress import task
from zoo.registry import find, load
from zoo.specs import TransferSpec
from zoo.streams import Stream
from zoo.transfers.objective import Objective, Phase


@dataclass(frozen=True)
class Settings:
    """How a transfer trains, whatever its method."""

    epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 64
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "none"
    warmup_epochs: int = 0
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    augment: str | Mapping[str, Any] | None = None
    patience: int | None = None
    clip_grad: float | None = None
    precision: str = "float32"
    workers: int = 0
    seed: int = 0


@dataclass
class Transferred:
    """What a transfer did: `model` is the one that was given, trained.

    history: one mapping per epoch: phase, epoch, loss, lr, seconds, images_per_second and, with
    validation data, val_accuracy and val_nll. notes: what was done beside it, in sentences.
    """

    model: Model
    method: str
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def transfer(
    model: Model,
    data: Any,
    method: str = "finetune",
    *,
    val: Any = None,
    unlabelled: Any = None,
    teachers: Sequence[Model] = (),
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 64,
    optimizer: str = "adam",
    weight_decay: float = 0.0,
    schedule: str = "none",
    warmup_epochs: int = 0,
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    activation: str | None = None,
    augment: str | Mapping[str, Any] | None = None,
    patience: int | None = None,
    clip_grad: float | None = None,
    precision: str = "float32",
    workers: int = 0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    **options: Any,
) -> Transferred:
    """Train a model on data by a method, in place.

    model: a Model; a name is refused, because what it names could not be found again afterwards.
    data: a CSV file, folder, address, registered name or torch data set; labels are matched to the
        model's classes by name, and the head is replaced by a fresh one when the names differ.
    val: more such data, or a share of `data` in (0, 1) to hold out; with it, the epoch with the
        best accuracy (then NLL) is kept.
    unlabelled: target images, for methods that adapt to them. teachers: models with the same
        classes, for methods that learn from them.
    lr: of any optimiser that timm knows (`optimizer`), on any schedule it knows (`schedule`).
    loss: cross_entropy, focal or bce. activation: put this one in place of every other (`relu`).
    augment: a timm policy (`rand-m9-n2`), `"basic"` for random crops and flips, or a mapping of
        timm.data.create_transform's arguments. patience: epochs without improvement before it
        stops. precision: float32 or bfloat16. workers: processes that decode images.
    checkpoint: a folder that keeps the last whole epoch; an interrupted run goes on from it.
    options: the method's own.

    When it fails, the model has the weights of the last whole epoch. Raises TrainingError when the
    loss is not finite or nothing can be trained, OptionError and DataError for what was given.
    """
    start = time.perf_counter()
    settings = Settings(epochs, lr, batch_size, optimizer, weight_decay, schedule, warmup_epochs,
                        loss, label_smoothing, augment, patience, clip_grad, precision, workers,
                        seed)
    _check(model, settings)
    spec = find(method, TransferSpec)
    values = checked(spec, options)
    result = Transferred(model, spec.name)
    train_set, val_set = _training_data(model, data, val, settings)
    target_set = _unlabelled(model, spec, unlabelled, settings)
    _check_teachers(model, spec, teachers)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        _prepare_model(model, train_set, activation, result)
        phases = _build(spec, model, settings, teachers, values)
        _train(result, phases, settings, train_set, val_set, target_set, teachers,
               Checkpoint.at(checkpoint, settings, spec.name, values, train_set))
    model.requires_grad_(True)
    model.eval()
    result.seconds = time.perf_counter() - start
    _remember(result, settings, values, train_set)
    return result


def _train(
    result: Transferred, phases: Sequence[Phase], settings: Settings, train_set: ImageData,
    val_set: ImageData | None, target_set: ImageData | None, teachers: Sequence[Model],
    checkpoint: Checkpoint,
) -> None:
    """Run the phases one after another, from wherever an earlier run stopped."""
    model = result.model
    lengths = _lengths(phases, settings.epochs)
    checkpoint.restore_model(model, result.history)
    for number, (phase, epochs) in enumerate(zip(phases, lengths, strict=True)):
        if number < checkpoint.phase:
            continue
        phase.objective.choose_trained()
        stream = Stream(model, train_set, settings, target_set, teachers,
                        frozen=_is_frozen(phase.objective))
        judge = _Judge(model, val_set, settings, stream.features is not None)
        run = _Phase(result, phase, number, epochs, stream, judge, settings,
                     done=sum(lengths[:number]) / sum(lengths), share=epochs / sum(lengths))
        run.fit(checkpoint)
    checkpoint.finish()


class _Phase:
    """One phase of one transfer: the loop itself."""

    def __init__(
        self, result: Transferred, phase: Phase, number: int, epochs: int, stream: Stream,
        judge: _Judge, settings: Settings, *, done: float, share: float,
    ) -> None:
        from accelerate import Accelerator
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2

        self.result = result
        self.objective = phase.objective
        self.number = number
        self.epochs = epochs
        self.stream = stream
        self.judge = judge
        self.settings = settings
        self.done = done
        self.share = share
        device = result.model.device
        self.objective.to(device)
        lr = settings.lr * phase.lr_scale
        try:
            self.optimizer = create_optimizer_v2(
                self.objective, opt=settings.optimizer, lr=lr, weight_decay=settings.weight_decay)
        except (AssertionError, ValueError) as error:
            raise OptionError("transfer", f"timm has no optimizer {settings.optimizer!r}: {error}; "
                              "timm.optim.list_optimizers() lists them") from None
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=settings.schedule, num_epochs=epochs, step_on_epochs=False,
            warmup_epochs=min(settings.warmup_epochs, epochs - 1), warmup_lr=lr / 10,
            updates_per_epoch=stream.steps)
        # Devices are the model's own affair; Accelerate brings the processes.
        self.accelerator = Accelerator(device_placement=False)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        if not self.trained:
            raise TrainingError(f"{result.method} leaves nothing to train in this model")

    def fit(self, checkpoint: Checkpoint) -> None:
        kept = _Kept(self.objective)
        first = checkpoint.resume(self.number, self.objective, self.optimizer, kept)
        try:
            for epoch in range(first, self.epochs):
                row = self._epoch(epoch)
                reason = self.objective.check(self.stream.last)
                if reason:
                    self.result.notes.append(f"stopped before epoch {epoch + 1}: {reason}")
                    break
                row.update(self.judge())
                self.result.history.append(row)
                kept.keep(row)
                checkpoint.write(self.number, epoch + 1, self.objective, self.optimizer, kept,
                                 self.result.history)
                if kept.waited(self.settings.patience):
                    self.result.notes.append(
                        f"stopped after epoch {epoch + 1}: no improvement for "
                        f"{self.settings.patience} epochs")
                    break
        except BaseException:
            kept.restore_last()
            raise
        kept.restore_best()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        # An epoch's random numbers depend on the epoch alone: a resumed run is the same run.
        torch.manual_seed(hash((self.settings.seed, self.number, epoch)) % 2**63)
        objective, optimizer, scheduler = self.wrapped, self.optimizer, self.scheduler
        objective.train()
        start = time.perf_counter()
        total = torch.zeros((), device=self.result.model.device)
        images = 0
        clip = self.settings.clip_grad
        label = f"{self.result.method} {epoch + 1}/{self.epochs}"
        with task(label, self.stream.images, "images") as advance:
            for step, batch in enumerate(self.stream.epoch(epoch, self.number)):
                batch.progress = self._progress(epoch, step)
                with self._autocast():
                    loss = objective(batch)
                optimizer.zero_grad(set_to_none=True)
                self.accelerator.backward(loss)
                if clip is not None:
                    self.accelerator.clip_grad_norm_(self.trained, clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step_update(epoch * self.stream.steps + step + 1)
                total += loss.detach() * len(batch.labels)
                images += len(batch.labels)
                advance(len(batch.labels))
        mean = float(total) / max(images, 1)
        if not math.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} in epoch {epoch + 1}; the model has the weights of the epoch "
                f"before. A learning rate below {self.settings.lr:g} or clip_grad=1 may help")
        seconds = time.perf_counter() - start
        return {"phase": self.number, "epoch": epoch, "loss": mean,
                "lr": self.optimizer.param_groups[0]["lr"], "seconds": seconds,
                "images_per_second": images / seconds}

    def _progress(self, epoch: int, step: int) -> float:
        return self.done + self.share * (epoch + step / self.stream.steps) / self.epochs

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = resolve_dtype(self.settings.precision)
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.result.model.device.type, dtype)


class _Judge:
    """Accuracy and NLL on the validation data after an epoch."""

    def __init__(
        self, model: Model, data: ImageData | None, settings: Settings, frozen: bool
    ) -> None:
        self.model = model
        self.data = data
        if data is None:
            return
        self.stream = Stream(model, data, settings, frozen=frozen, shuffled=False)
        self.labels = self.stream.labels

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        if self.data is None:
            return {}
        self.model.eval()
        logits = []
        for batch in self.stream.epoch(0, 0):
            if batch.features is not None:
                logits.append(self.model.classify(self.model.join(batch.features)))
            else:
                logits.append(self.model(batch.images))
        measured = measure(torch.cat(logits), self.labels, self.model.classes)
        return {"val_accuracy": measured["accuracy"], "val_nll": measured["nll"]}


class _Kept:
    """The trained tensors after the last whole epoch, and after the best one on validation."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.last = self._copy()
        self.best: dict[str, Tensor] | None = None
        self.score: tuple[float, float] | None = None
        self.waiting = 0

    def keep(self, row: Mapping[str, Any]) -> None:
        self.last = self._copy()
        if "val_accuracy" not in row:
            return
        score = (row["val_accuracy"], -row["val_nll"])
        if self.score is None or score > self.score:
            self.score, self.best, self.waiting = score, self.last, 0
        else:
            self.waiting += 1

    def waited(self, patience: int | None) -> bool:
        return patience is not None and self.waiting >= patience

    def restore_last(self) -> None:
        self.objective.load_state_dict(self.last, strict=False)

    def restore_best(self) -> None:
        self.objective.load_state_dict(self.best or self.last, strict=False)

    def _copy(self) -> dict[str, Tensor]:
        """Whatever an epoch can change: trained parameters, and all buffers."""
        moving = {name for name, p in self.objective.named_parameters() if p.requires_grad}
        moving |= {name for name, _ in self.objective.named_buffers()}
        return {name: tensor.detach().clone()
                for name, tensor in self.objective.state_dict().items() if name in moving}


def _check(model: object, settings: Settings) -> None:
    if not isinstance(model, Model):
        raise TrainingError(
            f"transfer trains the model that it is given, and {model!r} is not one; "
            "build it first: model = zoo.backbone(name, pretrained=True)")
    for name in ("epochs", "batch_size"):
        if getattr(settings, name) < 1:
            raise OptionError("transfer", f"{name} is {getattr(settings, name)}, "
                              "expected 1 or more")
    if not settings.lr > 0:
        raise OptionError("transfer", f"lr is {settings.lr}, expected more than 0")


def _training_data(
    model: Model, data: Any, val: Any, settings: Settings
) -> tuple[ImageData, ImageData | None]:
    train_set = load_data(data, role="train", image_size=model.image_size)
    if val is None:
        return train_set, None
    if isinstance(val, float):
        if not 0 < val < 1:
            raise OptionError("transfer", f"val is {val}, expected data or a share in (0, 1)")
        return train_set.split(val, seed=settings.seed)
    return train_set, load_data(val, role="test", image_size=model.image_size)


def _unlabelled(
    model: Model, spec: TransferSpec, given: Any, settings: Settings
) -> ImageData | None:
    if "unlabelled" not in spec.uses:
        if given is not None:
            raise OptionError(spec.name, "it does not use unlabelled data; leave it out")
        return None
    if given is None:
        raise OptionError(spec.name, "it adapts to target images; pass unlabelled=…")
    return load_data(given, role="train", image_size=model.image_size, labelled=False)


def _check_teachers(model: Model, spec: TransferSpec, teachers: Sequence[Model]) -> None:
    if teachers and "teachers" not in spec.uses:
        raise OptionError(spec.name, "it does not learn from teachers; leave them out")
    for teacher in teachers:
        if not isinstance(teacher, Model):
            raise OptionError(spec.name, f"the teacher {teacher!r} is not a zoo.Model")
        if teacher is model:
            raise OptionError(spec.name, "a model cannot be its own teacher; pass a copy")


def _prepare_model(
    model: Model, data: ImageData, activation: str | None, result: Transferred
) -> None:
    if set(model.classes) != set(data.classes):
        result.notes.append(f"the head was replaced: the data's {len(data.classes)} classes are "
                            f"not the model's {len(model.classes)}")
        model.reset_classes(data.classes)
    if activation:
        model.set_activation(activation)


def _build(
    spec: TransferSpec, model: Model, settings: Settings, teachers: Sequence[Model],
    values: Mapping[str, Any],
) -> Sequence[Phase]:
    builder = load(spec)
    extra = {"teachers": teachers} if accepts(builder, "teachers") else {}
    loss = criterion(settings.loss, settings.label_smoothing)
    built = builder(model, criterion=loss, **extra, **values)
    return [Phase(built)] if isinstance(built, Objective) else list(built)


def _is_frozen(objective: Objective) -> bool:
    return not objective.trunk and not objective.needs_images and objective.model.splits


def _lengths(phases: Sequence[Phase], epochs: int) -> list[int]:
    """Whole epochs for each phase, at least one, in proportion to their shares."""
    total = sum(phase.share for phase in phases)
    lengths = [max(1, round(epochs * phase.share / total)) for phase in phases]
    lengths[-1] = max(1, epochs - sum(lengths[:-1]))
    return lengths


def _remember(
    result: Transferred, settings: Settings, values: Mapping[str, Any], data: ImageData
) -> None:
    """Write the transfer into the model's own recipe."""
    changed = {name: value for name, value in asdict(settings).items()
               if value != getattr(Settings(), name) or name in ("epochs", "lr", "seed")}
    result.model.recipe.setdefault("transfers", []).append({
        "method": result.method, "settings": changed, "options": dict(values),
        "images": len(data), "data": data.fingerprint(),
    })
