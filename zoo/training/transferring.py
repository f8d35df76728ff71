"""Train a model on data by a method.

A method says what trains and what the loss of a batch is (an `Objective`); `zoo.training.loop` is
the one loop for all of them. Several processes are Accelerate's; optimisers, schedules and
augmentation are timm's.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from zoo.datasets import ImageData, load_data
from zoo.errors import DataError, OptionError, TrainingError
from zoo.features import evaluating
from zoo.model import Model
from zoo.options import accepts, checked
from zoo.registry import find, load
from zoo.specs import TransferSpec
from zoo.tensors.digest import digest
from zoo.training.checkpoints import Checkpoint
from zoo.training.cutting import Cut, find_cut
from zoo.training.loop import Judge, Loop, Transferred
from zoo.training.loop import seed as set_seed
from zoo.training.losses import criterion
from zoo.training.processes import processes
from zoo.training.settings import Settings
from zoo.training.streams import Stream
from zoo.transfers.objective import Objective, Phase

__all__ = ["Transferred", "transfer"]

_LONGEST_RECIPE = 100_000  # characters of a teacher's, as JSON


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
    views: int | None = None,
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
        model's classes by name, and the head is replaced by a fresh one when the names differ. A
        method that learns from teachers alone (distill with alpha=1) takes images without labels:
        the head then stays if the teachers have its classes, else it is replaced by one for those
        that all of them have.
    val: more such data, or a share of `data` in (0, 1) to hold out; with it, the epoch with the
        best accuracy (then NLL) is kept.
    unlabelled: target images, for methods that adapt to them. teachers: models that have the same
        classes, in any order and among others, for methods that learn from them. They see the
        images as the model does, loaded at the largest size that one of them asks for.
    batch_size: images in one step, of each process where there are several. optimizer: any that
        timm knows. weight_decay: spares biases and norms. schedule: of the learning rate, by step:
        none, cosine, tanh, step (every third of the epochs), multistep (at a half and three
        quarters) or poly. loss: cross_entropy, focal or bce. activation: put this one in place of
        every other (`relu`).
    augment: `"basic"` for random crops and flips, a timm policy (`"rand-m9-n2"`), or a mapping of
        timm.data.create_transform's arguments. views: how many variants of each image there are
        for a frozen network, which sees each once; epoch after epoch takes its turn with one of
        them. By default every epoch has new ones. patience: epochs without improvement before it
        stops. clip_grad: largest norm of the gradient. precision: float32 or bfloat16. workers:
        processes that decode images. seed: 0 to 2³² - 1.
    checkpoint: a folder that keeps the last whole epoch; an interrupted run goes on from it.
    options: the method's own.

    When it fails, the model has the weights of the last whole epoch, and is what it was when there
    was none. Raises TrainingError when the loss is not finite or nothing can be trained,
    OptionError and DataError for what was given.
    """
    start = time.perf_counter()
    if not isinstance(model, Model):
        raise TrainingError(
            f"transfer trains the model that it is given, and {model!r} is not one; "
            "build it first: model = zoo.backbone(name, pretrained=True)")
    settings = Settings(epochs, lr, batch_size, optimizer, weight_decay, schedule, warmup_epochs,
                        loss, label_smoothing, augment, patience, clip_grad, precision, workers,
                        seed, views)
    settings.check(model.image_size, validated=val is not None)
    spec = find(method, TransferSpec)
    values = checked(spec, options)
    _check_teachers(model, spec, teachers)
    size = max(each.image_size for each in (model, *teachers))
    train_set, val_set = _training_data(data, val, settings, size, spec, values)
    target_set = _unlabelled(model, spec, unlabelled)
    result = Transferred(model, spec.name)
    started_from = digest(model.state_dict())
    own = [model.device] if model.device.type == "cuda" else []
    with _only_training(result, teachers), torch.random.fork_rng(devices=own):
        set_seed(seed, model.device)
        _prepare_model(model, train_set, activation, result)
        state = processes(model)
        kept = Checkpoint(checkpoint, {} if checkpoint is None else {
            "method": spec.name, "options": values, **asdict(settings), "activation": activation,
            "model": model.name, "parameters": sum(p.numel() for p in model.parameters()),
            "teachers": [digest(teacher.state_dict()) for teacher in teachers],
            **{role: images.fingerprint() if images else None for role, images in
               (("data", train_set), ("val", val_set), ("unlabelled", target_set))},
        }, writes=state.is_main_process)
        phases = _build(spec, model, settings, teachers, values)
        if train_set.labels is None:
            _learn_classes(model, teachers, phases, result)
        _train(result, phases, settings, train_set, val_set, target_set, teachers, kept)
    result.seconds = time.perf_counter() - start
    told = {"val": val if isinstance(val, float) else val_set.told()} if val_set else {}
    if target_set is not None:
        told["unlabelled"] = target_set.told()
    _remember(result, settings, values, train_set, activation, teachers, started_from, told)
    return result


def _train(
    result: Transferred, phases: Sequence[Phase], settings: Settings, train_set: ImageData,
    val_set: ImageData | None, target_set: ImageData | None, teachers: Sequence[Model],
    checkpoint: Checkpoint,
) -> None:
    """Run the phases one after another, from wherever an earlier run stopped."""
    model = result.model
    lengths = _lengths(result.method, phases, settings.epochs)
    _want_views(result, phases, settings)
    checkpoint.restore_model(model, result.history)
    state = processes(model)
    for number, (phase, epochs) in enumerate(zip(phases, lengths, strict=True)):
        if number < checkpoint.phase:
            continue
        objective = phase.objective
        objective.choose_trained()
        frozen = _is_frozen(phase, model)
        partly = bool(objective.frozen) and not objective.needs_images
        cut = find_cut(objective, train_set) if partly else None
        stream = Stream(model, train_set, settings, target_set, teachers, frozen=frozen, cut=cut,
                        matched=objective.reads_logits,
                        rank=state.process_index, world=state.num_processes)
        if partly:
            result.notes.append(_about_cut(cut, stream))
        objective.begin(stream.everything_taught())
        judge = Judge(model, val_set, settings, cut=cut,
                      frozen=frozen and (stream.frozen or stream.augments))
        run = Loop(result, phase, number, epochs, stream, judge, settings,
                     done=sum(lengths[:number]) / sum(lengths), share=epochs / sum(lengths))
        run.fit(checkpoint)
    checkpoint.finish()


def _is_frozen(phase: Phase, model: Model) -> bool:
    """Whether a phase asks no more of the networks than their features, and leaves them alone."""
    return not phase.objective.trunk and not phase.objective.needs_images and model.splits


def _want_views(result: Transferred, phases: Sequence[Phase], settings: Settings) -> None:
    if settings.views is not None and not any(
            _is_frozen(phase, result.model) or phase.objective.frozen for phase in phases):
        raise OptionError(result.method, "views are for frozen networks, and this trains them; "
                          "leave views out, freeze a part of them or use linear_probe")


def _about_cut(cut: Cut | None, stream: Stream) -> str:
    """What became of the layers that are frozen."""
    if cut is None:
        return ("the frozen layers are run in every epoch: before them or beside them something "
                "trains")
    if stream.cut is None:
        return ("the frozen layers are run in every epoch: there is no room for what they give "
                f"({cut})")
    if stream.views is None:
        return ("the frozen layers are run in every epoch, on images that are augmented anew; "
                "with views= they would be run on so many variants alone")
    return f"the frozen layers were run once, up to {cut}"


@contextmanager
def _only_training(result: Transferred, teachers: Sequence[Model]) -> Iterator[None]:
    """Leave nothing behind but what was trained: no gradients, no flags on parameters, no teacher
    in another mode, and no new head or activations when not one epoch was finished."""
    model = result.model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = [(module, dict(module.__dict__), [dict(table) for table in _tables(module)])
               for module in model.modules()]
    try:
        with evaluating(*teachers):
            yield
    except BaseException:
        if not result.history:
            for module, attributes, tables in modules:
                module.__dict__.update(attributes)
                for table, entries in zip(_tables(module), tables, strict=True):
                    table.clear()
                    table.update(entries)
        raise
    finally:
        model.zero_grad()
        model.requires_grad_(True)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.eval()


def _tables(module: torch.nn.Module) -> list[dict[str, Any]]:
    return [module._modules, module._parameters, module._buffers]


def _training_data(
    data: Any, val: Any, settings: Settings, size: int, spec: TransferSpec,
    values: Mapping[str, Any],
) -> tuple[ImageData, ImageData | None]:
    try:
        train_set = load_data(data, role="train", image_size=size)
    except DataError:
        if not _learns_without_labels(spec, values):
            raise
        train_set = load_data(data, role="train", image_size=size, labelled=False)
    if val is None:
        return train_set, None
    if isinstance(val, float):
        if not 0 < val < 1:
            raise OptionError("transfer", f"val is {val}, expected data or a share in (0, 1)")
        if train_set.labels is None:
            raise OptionError("transfer", f"val is {val}, and the images that it is a share of "
                              "have no labels; pass labelled data")
        return train_set.split(val, seed=settings.seed)
    return train_set, load_data(val, role="test", image_size=size)


def _learns_without_labels(spec: TransferSpec, values: Mapping[str, Any]) -> bool:
    wanted = spec.without_labels
    return bool(wanted) and all(values.get(name) == value for name, value in wanted.items())


def _unlabelled(model: Model, spec: TransferSpec, given: Any) -> ImageData | None:
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
    if isinstance(teachers, (Model, str)):
        given = "a model" if isinstance(teachers, Model) else repr(teachers)
        raise OptionError(spec.name, f"teachers is {given}, expected a list of models: "
                          "teachers=[teacher]")
    for teacher in teachers:
        if not isinstance(teacher, Model):
            raise OptionError(spec.name, f"the teacher {teacher!r} is not a zoo.Model")
        if teacher is model:
            raise OptionError(spec.name, "a model cannot be its own teacher; pass a copy")


def _prepare_model(
    model: Model, data: ImageData, activation: str | None, result: Transferred
) -> None:
    if data.labels is not None and set(model.classes) != set(data.classes):
        result.notes.append(f"the head was replaced: the data's {len(data.classes)} classes are "
                            f"not the model's {len(model.classes)}")
        model.reset_classes(data.classes)
    if activation:
        model.set_activation(activation)


def _learn_classes(
    model: Model, teachers: Sequence[Model], phases: Sequence[Phase], result: Transferred
) -> None:
    """The head for images without labels: the model's own where each teacher has its classes, else
    a fresh one for the classes that all teachers have, in the order of the first."""
    if not teachers or not any(phase.objective.reads_logits for phase in phases):
        return
    common = [name for name in teachers[0].classes
              if all(name in teacher.classes for teacher in teachers)]
    if set(model.classes) <= set(common):
        return
    if not common:
        raise DataError("the teachers have no class in common, and the images have no labels")
    result.notes.append(f"the head was replaced: the teachers' {len(common)} classes are not the "
                        f"model's {len(model.classes)}")
    model.reset_classes(common)


def _build(
    spec: TransferSpec, model: Model, settings: Settings, teachers: Sequence[Model],
    values: Mapping[str, Any],
) -> Sequence[Phase]:
    builder = load(spec)
    extra = {"teachers": teachers} if accepts(builder, "teachers") else {}
    loss = criterion(settings.loss, settings.label_smoothing)
    built = builder(model, criterion=loss, **extra, **values)
    return [Phase(built)] if isinstance(built, Objective) else list(built)


def _lengths(method: str, phases: Sequence[Phase], epochs: int) -> list[int]:
    """Whole epochs for each phase, at least one, the others in proportion to their shares."""
    if epochs < len(phases):
        raise OptionError(method, f"it trains in {len(phases)} parts and epochs is {epochs}; "
                          f"expected {len(phases)} or more")
    total = sum(phase.share for phase in phases)
    shares = [sum(phase.share for phase in phases[:end]) / total for end in range(len(phases) + 1)]
    ends = [round(share * (epochs - len(phases))) for share in shares]
    return [1 + end - start for start, end in itertools.pairwise(ends)]


def _taught_by(teacher: Model) -> dict[str, Any]:
    """A teacher with all that finds it again. Where student and teacher take turns, each recipe
    holds the other's, and both double every time: a long one is left out."""
    told = teacher.told(apart=True)
    if len(json.dumps(told.get("recipe", {}))) > _LONGEST_RECIPE:
        del told["recipe"]
    return told


def _remember(
    result: Transferred, settings: Settings, values: Mapping[str, Any], data: ImageData,
    activation: str | None, teachers: Sequence[Model], started_from: str, others: Mapping[str, Any],
) -> None:
    """Write the transfer into the model's own recipe, as JSON values."""
    changed = {name: value for name, value in asdict(settings).items()
               if value != getattr(Settings(), name) or name in ("epochs", "lr", "seed")}
    told = {"method": result.method, "settings": changed, "options": dict(values),
            **data.told(), "started_from": started_from, **others}
    if activation:
        told["activation"] = activation
    if result.model.device.type != "cpu":
        told["device"] = result.model.device.type
    if teachers:
        told["teachers"] = [_taught_by(teacher) for teacher in teachers]
    result.model.recipe.setdefault("transfers", []).append(told)
