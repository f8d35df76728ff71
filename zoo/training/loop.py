"""The loop that every transfer method trains in."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from zoo.datasets import ImageData
from zoo.device import resolve_dtype
from zoo.errors import TrainingError
from zoo.features import evaluating
from zoo.measures import measure
from zoo.model import Model
from zoo.progress import task
from zoo.training.checkpoints import Checkpoint, Kept
from zoo.training.cutting import Cut
from zoo.training.settings import Settings, make_optimizer, make_scheduler
from zoo.training.streams import Stream
from zoo.transfers.objective import Phase


@dataclass
class Transferred:
    """What a transfer did: `model` is the one that was given, trained.

    history: one mapping per epoch: phase, epoch, loss, lr (with which it began), seconds,
    images_per_second and, with validation data, val_accuracy and val_nll. notes: what was done
    beside it, in sentences.
    """

    model: Model
    method: str
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Loop:
    """One phase of one transfer: the loop itself."""

    def __init__(
        self, result: Transferred, phase: Phase, number: int, epochs: int, stream: Stream,
        judge: Judge, settings: Settings, *, done: float, share: float,
    ) -> None:
        self.result = result
        self.objective = phase.objective
        self.number = number
        self.epochs = epochs
        self.stream = stream
        self.judge = judge
        self.settings = settings
        self.done = done
        self.share = share
        self.device = result.model.device
        self.objective.to(self.device)
        self.trained = [p for p in self.objective.parameters() if p.requires_grad]
        if not self.trained:
            raise TrainingError(f"{result.method} leaves nothing to train in this model")
        self.optimizer = make_optimizer(self.objective, settings, settings.lr * phase.lr_scale)
        self.scheduler = make_scheduler(self.optimizer, settings, epochs, stream.steps)
        self.wrapped: torch.nn.Module = self.objective
        self.accelerator: Accelerator | None = None
        if stream.world > 1:  # one process needs none of it, nor its settings for the whole process
            idle = DistributedDataParallelKwargs(
                find_unused_parameters=self.objective.trunk and result.model.unpooled)
            self.accelerator = Accelerator(device_placement=False, kwargs_handlers=[idle])
            self.wrapped = self.accelerator.prepare(self.objective)

    def fit(self, checkpoint: Checkpoint) -> None:
        kept = Kept(self.objective)
        first = checkpoint.resume(self.number, self.objective, self.optimizer, kept)
        patience = self.settings.patience
        try:
            for epoch in range(first, self.epochs):
                if patience is not None and kept.waiting >= patience:
                    self.result.notes.append(f"stopped after epoch {epoch}: no improvement for "
                                             f"{patience} epochs")
                    break
                row = self._epoch(epoch)
                reason, row = self._agreed((self.objective.check(self.stream.first), row))
                if reason:
                    self.result.notes.append(f"stopped before epoch {epoch + 1}: {reason}")
                    break
                self.objective.record_norms()
                self.result.history.append(row)
                kept.keep(row)
                checkpoint.write(self.number, epoch + 1, self.objective, self.optimizer, kept,
                                 self.result.history)
        except BaseException:
            kept.restore_last()
            raise
        kept.restore_best()

    def _epoch(self, epoch: int) -> dict[str, Any]:
        # An epoch's random numbers depend on the epoch alone: a resumed run is the same run. Each
        # process has its own, or what they draw would be the same noise on different images.
        rank = self.stream.rank
        seed(hash((self.settings.seed, self.number, epoch, *([rank] if rank else []))) % 2**63,
             self.device)
        objective, optimizer, scheduler = self.wrapped, self.optimizer, self.scheduler
        clip, steps = self.settings.clip_grad, self.stream.steps
        objective.train()
        lr = optimizer.param_groups[0]["lr"]
        start = time.perf_counter()
        total = torch.zeros((), device=self.device)
        images = 0
        label = f"{self.result.method} {epoch + 1}/{self.epochs}"
        with task(label, self.stream.images, "images") as advance:
            for step, batch in enumerate(self.stream.epoch(epoch, self.number)):
                batch.progress = self.done + self.share * (epoch + step / steps) / self.epochs
                with self._autocast(), self.stream.entering():
                    loss = objective(batch)
                optimizer.zero_grad()
                loss.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.trained, clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step_update(epoch * steps + step + 1)
                total += loss.detach() * len(batch.labels)
                images += len(batch.labels)
                advance(len(batch.labels))
        mean, images = self._over_processes(total, images)
        self._want_finite(mean, epoch)
        seconds = time.perf_counter() - start
        return {"phase": self.number, "epoch": epoch, "loss": mean, "lr": lr, "seconds": seconds,
                "images_per_second": images / seconds, **self.judge()}

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = resolve_dtype(self.settings.precision)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype)

    def _over_processes(self, total: torch.Tensor, images: int) -> tuple[float, int]:
        """The mean loss and the number of images of all processes; rank 0's buffers for all."""
        if self.accelerator is not None:
            sums = torch.stack([total.double(), total.new_tensor(images).double()])
            total, count = self.accelerator.reduce(sums, "sum")
            images = int(count)
            for buffer in self.objective.buffers():
                if buffer.numel():
                    torch.distributed.broadcast(buffer, 0)
        return float(total) / images, images

    def _agreed(self, decided: tuple[str | None, dict[str, Any]]) -> tuple[str | None, Any]:
        """What rank 0 decided, in every process: they must stop at the same epoch."""
        return decided if self.accelerator is None else broadcast_object_list([decided])[0]

    def _want_finite(self, loss: float, epoch: int) -> None:
        weights = all(bool(p.isfinite().all()) for p in self.trained)
        if math.isfinite(loss) and weights:
            return
        what = f"the loss is {loss:g}" if not math.isfinite(loss) else "a weight is not finite"
        raise TrainingError(
            f"{what} in epoch {epoch + 1}; the model has the weights of the epoch before. "
            f"A learning rate below {self.settings.lr:g} or clip_grad=1 may help")


class Judge:
    """Accuracy and NLL on the validation data after an epoch."""

    def __init__(
        self, model: Model, data: ImageData | None, settings: Settings, *, frozen: bool,
        cut: Cut | None = None,
    ) -> None:
        self.model = model
        self.stream = None if data is None else Stream(
            model, data, settings, frozen=frozen, cut=cut, shuffled=False)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        if self.stream is None:
            return {}
        logits = []
        with evaluating(self.model):
            for batch in self.stream.epoch(0, 0):
                if batch.features is not None:
                    logits.append(self.model.classify(self.model.join(batch.features)))
                else:
                    with self.stream.entering():
                        logits.append(self.model(batch.images))
        measured = measure(torch.cat(logits), self.stream.labels, self.model.classes)
        return {"val_accuracy": measured["accuracy"], "val_nll": measured["nll"]}


def seed(number: int, device: torch.device) -> None:
    """Seed what a model on this device draws from. torch.manual_seed would seed other devices too,
    and nobody would put them back."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)
