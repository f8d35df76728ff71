"""How a transfer trains, whatever its method; wrong settings are refused before any work."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from zoo.device import resolve_dtype
from zoo.errors import OptionError
from zoo.names import suggest
from zoo.training.augmentation import transform
from zoo.training.losses import criterion

SCHEDULES = ("none", "cosine", "tanh", "step", "multistep", "poly")


@dataclass(frozen=True)
class Settings:
    """The arguments of `zoo.transfer` that every method shares; it documents them."""

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
    views: int | None = None

    def check(self, image_size: int, *, validated: bool) -> None:
        """Raise OptionError for the first setting that cannot be used.

        image_size: of the images that an augmentation gives. validated: there is validation data.
        """
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0),
                            ("workers", 0), ("seed", 0), ("patience", 1), ("views", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise _wrong(name, value, f"a whole number, {least} or more")
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise _wrong(name, value, "more than 0")
        if not 0 <= self.weight_decay < math.inf:
            raise _wrong("weight_decay", self.weight_decay, "0 or more")
        if self.seed >= 2**32:
            raise _wrong("seed", self.seed, "less than 2³²")
        if self.patience is not None and not validated:
            raise OptionError("transfer", "patience waits for an improvement on validation data, "
                              "and there are none; pass val=")
        if self.views is not None and self.augment is None:
            raise OptionError("transfer", "views are of augmented images; pass augment=, or leave "
                              "views out")
        if resolve_dtype(self.precision) not in (torch.float32, torch.bfloat16):
            raise _wrong("precision", self.precision, "float32 or bfloat16")
        criterion(self.loss, self.label_smoothing)
        if self.augment is not None:
            _want_json(self.augment)
            transform(self.augment, image_size)
        weight = nn.Parameter(torch.zeros(2, 2))
        make_scheduler(make_optimizer([weight], self, self.lr), self, self.epochs, 1)


def make_optimizer(
    trained: nn.Module | Iterable[nn.Parameter], settings: Settings, lr: float
) -> torch.optim.Optimizer:
    """timm's optimiser of the settings' name; weight decay spares biases and norms."""
    name = settings.optimizer
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            trained, opt=name, lr=lr, weight_decay=settings.weight_decay)
    except Exception as error:  # a missing apex is an assertion, a missing bitsandbytes an import
        known = list_optimizers()
        near = suggest(name, known)
        hint = f"; did you mean {near[0]!r}?" if near and name not in known else ""
        raise OptionError("transfer", f"timm cannot make the optimizer {name!r}: {error}{hint} "
                          "(timm.optim.list_optimizers() lists them)") from None
    if getattr(optimizer, "is_second_order", False):
        raise OptionError("transfer", f"the optimizer {name!r} needs second derivatives, which "
                          "the loop does not compute; use another, such as 'adamw'")
    return optimizer


def make_scheduler(
    optimizer: torch.optim.Optimizer, settings: Settings, epochs: int, steps: int
) -> Any:
    """timm's schedule of the settings' name over so many epochs of so many steps, or None."""
    name = settings.schedule
    lr = optimizer.param_groups[0]["lr"]
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer, sched=name, num_epochs=epochs, step_on_epochs=False,
            updates_per_epoch=steps, warmup_epochs=min(settings.warmup_epochs, epochs - 1),
            warmup_lr=lr / 10, decay_epochs=max(1, epochs // 3) if name == "step" else None,
            decay_milestones=[epochs // 2, epochs * 3 // 4])
    except Exception as error:
        near = suggest(name, SCHEDULES)
        hint = f"; did you mean {near[0]!r}?" if near and name not in SCHEDULES else ""
        raise OptionError("transfer", f"timm cannot make the schedule {name!r}: {error}{hint} "
                          f"({', '.join(SCHEDULES)})") from None
    return scheduler


def _want_json(augment: object) -> None:
    try:
        json.dumps(augment, allow_nan=False)
    except (TypeError, ValueError):
        raise _wrong("augment", augment, "a name or a mapping of JSON values") from None


def _wrong(name: str, value: object, expected: str) -> OptionError:
    return OptionError("transfer", f"{name} is {value!r}, expected {expected}")
