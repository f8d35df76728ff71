"""Measure a model on labelled images, clean and under attack."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zoo.attacks import resolve_attack
from zoo.attacks.gradients import zero_gradient_share
from zoo.datasets import ImageData, load_data, loader, to_unit
from zoo.errors import ZooError
from zoo.features import evaluating
from zoo.measures import measure, wilson
from zoo.model import Model
from zoo.progress import task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model is worth on one data set.

    accuracy with its 95 % interval (Wilson), top5 (None up to 5 classes), nll in nats, ece with 15
    bins, confusion [C][C] (rows are true), per_class, parameters, seconds and images. attacks: for
    each attack its options, the accuracy that is left, its interval, and the share of images
    without any gradient, where a gradient attack is blind. robust: right without and under every
    attack. correct, predictions: one per image, for paired tests.
    """

    n: int
    accuracy: float
    interval: tuple[float, float]
    top5: float | None
    nll: float
    ece: float
    confusion: list[list[int]]
    per_class: Mapping[str, Mapping[str, float | int | None]]
    parameters: int
    seconds: float
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    robust: float | None = None
    correct: Tensor
    predictions: Tensor

    def as_dict(self) -> dict[str, Any]:
        """The measures as JSON values, without the per-image tensors."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)
                 if f.name not in ("correct", "predictions")}
        return {**plain, "interval": list(self.interval)}


def evaluate(
    model: Model,
    data: Any,
    *,
    attacks: Mapping[str, Mapping[str, Any]] | Sequence[str] | str = (),
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
) -> Evaluation:
    """Measure a model.

    data: a CSV file, folder, address, registered name (its test split) or torch data set; its
        classes are matched to the model's by name and may be fewer.
    attacks: a name, names, or names with options: `{"pgd": {"eps": 0.1, "steps": 40}}`; ε is a
        change of pixels on [0, 1]. seed: of the attacks' random starts.

    Raises DataError for wrong data, UnknownName and OptionError for wrong attacks.
    """
    if not isinstance(model, Model):
        raise ZooError(f"evaluate measures a zoo.Model, and {model!r} is not one; "
                       "load it first: zoo.load(path) or zoo.backbone(name, pretrained=True)")
    names = [attacks] if isinstance(attacks, str) else attacks
    chosen = names if isinstance(names, Mapping) else {name: {} for name in names}
    bound = {name: resolve_attack(name, options, seed=seed) for name, options in chosen.items()}
    images = load_data(data, role="test", image_size=model.image_size).with_classes(model.classes)
    assert images.labels is not None
    start = time.perf_counter()
    logits = predict(model, images, batch_size=batch_size, workers=workers)
    seconds = time.perf_counter() - start
    correct = logits.argmax(1) == images.labels  # (N,)
    survived = correct.clone()
    attacked: dict[str, dict[str, Any]] = {}
    for name, attack in bound.items():
        attacked[name], right = _attack(model, images, name, attack, batch_size, workers)
        attacked[name]["options"] = dict(chosen[name])
        survived &= right
    return Evaluation(
        **measure(logits, images.labels, model.classes), seconds=seconds,
        parameters=sum(p.numel() for p in model.parameters()), attacks=attacked,
        robust=int(survived.sum()) / len(images) if attacked else None,
        correct=correct, predictions=logits.argmax(1),
    )


@torch.inference_mode()
def predict(
    model: Model, images: ImageData, *, batch_size: int = 64, workers: int = 0
) -> Tensor:
    """Logits [N, classes] on the CPU, in the order of the data; the model's modes are kept."""
    parts = []
    with evaluating(model), task("evaluate", len(images), "images") as advance:
        for pixels, _ in loader(images, batch_size=batch_size, workers=workers):
            logits = model(to_unit(pixels.to(model.device, non_blocking=True)))
            parts.append(logits.float().cpu())
            advance(len(pixels))
    return torch.cat(parts)


def _attack(
    model: Model, images: ImageData, name: str, attack: Any, batch_size: int, workers: int
) -> tuple[dict[str, Any], Tensor]:
    right: list[Tensor] = []
    blind = 0.0
    with evaluating(model), task(f"attack {name}", len(images), "images") as advance:
        for pixels, labels in loader(images, batch_size=batch_size, workers=workers):
            clean = to_unit(pixels.to(model.device))
            true = labels.to(model.device)
            adversarial = attack(model, clean, true)
            with torch.no_grad():
                right.append((model(adversarial).argmax(1) == true).cpu())
            blind += zero_gradient_share(model, clean, true) * len(pixels)
            advance(len(pixels))
    survived = torch.cat(right)
    hits = int(survived.sum())
    return {"accuracy": hits / len(images), "interval": list(wilson(hits, len(images))),
            "zero_gradients": blind / len(images)}, survived
