"""Measure a model on labelled images, clean and under attack."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from zoo.attacks import resolve_attack
from zoo.attacks.gradients import zero_gradient_share
from zoo.datasets import ImageData, load_data, loader, public_name, to_unit
from zoo.errors import ZooError
from zoo.features import (
    Features,
    can_hold,
    evaluating,
    features_of,
    given_once,
    has_room,
    logits_of,
    take,
    trunk_features,
)
from zoo.measures import measure, wilson
from zoo.member import Member
from zoo.model import Model
from zoo.progress import task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model is worth on one data set.

    accuracy with its 95 % interval (Wilson), top5 (None up to 5 classes), nll in nats, ece with 15
    bins, confusion [C][C] (rows are true), per_class, parameters, images, and seconds: few where
    what the networks give of these images was kept (`zoo.features`). attacks: for each attack its
    options, the accuracy that is left, its interval, and the share of images without any gradient,
    where a gradient attack is blind. robust: right without and under every attack. correct,
    predictions: one per image, for paired tests. calibration: the bins of ece, as {n, confidence,
    accuracy}. data: its registered name or its address on the Hub; "" of any other, which is
    nobody else's business.
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
    calibration: list[dict[str, Any]] = field(default_factory=list)
    data: str = ""

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
        correct=correct, predictions=logits.argmax(1), data=public_name(data),
    )


def predict(
    model: Model, images: ImageData, *, batch_size: int = 64, workers: int = 0, keep: bool = True
) -> Tensor:
    """Logits [N, classes] on the CPU, in the order of the data; the model's modes are kept.

    keep: what the networks give of the images is looked up and kept (`zoo.features`), where there
    is room; False for a model that nobody will ask again.
    """
    if not keep or not _has_room(model, images):
        return _predict(model, images, batch_size, workers)
    with torch.no_grad(), evaluating(model):
        if model.splits:
            given = trunk_features(model, images, workers=workers)
            parts = [model.classify(model.join(rows))
                     for rows in _batches(given, batch_size, model.device)]
        else:
            given = tuple(member_logits(model, images, batch_size=batch_size, workers=workers))
            parts = [_decide(model, rows) for rows in _batches(given, batch_size, model.device)]
        return torch.cat([part.float().cpu() for part in parts])


@torch.no_grad()
def member_logits(
    model: Model, images: ImageData, *, batch_size: int = 64, workers: int = 0
) -> Tensor:
    """Each member's own logits [M, N, classes], in the order of the model's classes and of the
    data, on the CPU. They are the classifiers' answers to kept features, and kept themselves where
    a network has more than a classifier after its features.

    Raises ZooError for a fusion of features, whose members have none.
    """
    if model.kind == "features":
        raise ZooError(f"the members of {model.name} give features and have no logits of their own")
    members = list(model.each_member())
    wanted = [features_of(member) if _has_kept_head(member) else logits_of(member)
              for member in members]
    given = given_once(model, images, wanted, description="logits", workers=workers)
    answers = []
    with evaluating(model):
        for member, part in zip(members, given, strict=True):
            logits = part
            if _has_kept_head(member):
                logits = torch.cat([member.classify(rows).cpu() for (rows,) in
                                    _batches((part,), batch_size, model.device)])
            answers.append(logits)
    return torch.stack(model.in_order(answers))


def _decide(model: Model, logits: Features) -> Tensor:
    return logits[0] if model.fuser is None else model.fuser(torch.stack(logits), None)


def _has_kept_head(member: Member) -> bool:
    return member.splits and member.gives == "vectors"


def _has_room(model: Model, images: ImageData) -> bool:
    """Whether all features and logits fit into the memory for what is kept."""
    numbers = sum(member.dim + len(member.classes) for member in model.each_member())
    return has_room(len(images) * numbers * 4) and can_hold(model, images)


def _batches(given: Features, size: int, device: torch.device) -> Iterator[Features]:
    for start in range(0, len(given[0]), size):
        yield take(given, slice(start, start + size), device)


@torch.inference_mode()
def _predict(model: Model, images: ImageData, batch_size: int, workers: int) -> Tensor:
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
