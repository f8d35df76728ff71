"""The batches of an epoch: images, or what a frozen trunk and the teachers say of them, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.augmentation import augmented
from zoo.datasets import Batches, ImageData, index_batches, to_unit
from zoo.errors import DataError
from zoo.features import Features, extract, take
from zoo.model import Model
from zoo.transfers.objective import Batch, Taught

if TYPE_CHECKING:
    from zoo.training import Settings


class Stream:
    """The same data epoch after epoch, in an order that depends on (seed, epoch) alone.

    frozen: the model's trunk does not change, so its features are computed here, once. Without
    augmentation the teachers' answers are too. Several processes take turns at the batches.
    """

    last: Batch

    def __init__(
        self, model: Model, data: ImageData, settings: Settings, target: ImageData | None = None,
        teachers: Sequence[Model] = (), *, frozen: bool = False, shuffled: bool = True,
    ) -> None:
        from accelerate import PartialState

        state = PartialState()
        self.rank, self.world = state.process_index, state.num_processes
        self.model = model
        self.settings = settings
        self.target = target
        self.teachers = teachers
        self.shuffled = shuffled
        self.data = with_labels(data, model.classes)
        assert self.data.labels is not None
        self.labels: Tensor = self.data.labels
        self.columns = [_columns(teacher, model.classes) for teacher in teachers]
        self.features: Features | None = None
        self.taught: list[Features] | None = None
        self.augments = shuffled and settings.augment is not None
        if self.augments:
            self.data = augmented(self.data, settings.augment, model.image_size)
        else:
            self._compute_once(frozen)
        n = len(self.data)
        self.steps = max(1, len(self._order(0)) // self.world if shuffled else len(self._order(0)))
        self.images = min(n, self.steps * settings.batch_size)

    def epoch(self, epoch: int, phase: int) -> Iterator[Batch]:
        """The batches of one epoch of one phase, on the model's device."""
        order = self._order(1_000 * phase + epoch)
        if self.shuffled:
            order = order[self.rank::self.world][:self.steps]
        device = self.model.device
        targets = self._targets(epoch) if self.target is not None else itertools.repeat(None)
        images: Iterator[Tensor | None] = itertools.repeat(None)
        if self.features is None:
            images = (x for x, _ in Batches(self.data, order, self.settings.workers))
        for indices, pixels, unlabelled in zip(order, images, targets, strict=False):
            rows = torch.as_tensor(indices)
            batch = Batch(labels=self.labels[rows].to(device, non_blocking=True))
            if pixels is not None:
                batch.images = to_unit(pixels.to(device, non_blocking=True))
            if self.features is not None:
                batch.features = take(self.features, rows, device)
            if unlabelled is not None:
                batch.unlabelled = to_unit(unlabelled.to(device, non_blocking=True))
            batch.taught = self._taught(rows, batch.images)
            self.last = batch
            yield batch

    def _compute_once(self, frozen: bool) -> None:
        workers = self.settings.workers
        if frozen:
            self.features = extract(self.model, self.data, self.model.trunk, workers=workers)
        if self.teachers:
            self.taught = [
                extract(teacher, self.data, lambda x, t=teacher: _answer(t, x),  # type: ignore[misc]
                        description="teacher", workers=workers)
                for teacher in self.teachers
            ]

    def _order(self, epoch: int) -> list[list[int]]:
        size = self.settings.batch_size
        # A batch of one image has no statistics for batch norm.
        single = self.shuffled and len(self.data) > size and len(self.data) % size == 1
        return index_batches(len(self.data), size, shuffle=self.shuffled, seed=self.settings.seed,
                             epoch=epoch, drop_last=single)

    def _targets(self, epoch: int) -> Iterator[Tensor]:
        """Target images without end, in batches as large as the source's."""
        assert self.target is not None
        size = min(self.settings.batch_size, len(self.target))
        for turn in itertools.count():
            order = index_batches(len(self.target), size, shuffle=True,
                                  seed=self.settings.seed + 1, epoch=1_000 * epoch + turn,
                                  drop_last=True)
            for images, _ in Batches(self.target, order[self.rank::self.world] or order,
                                     self.settings.workers):
                yield images

    def _taught(self, rows: Tensor, images: Tensor | None) -> tuple[Taught, ...]:
        if not self.teachers:
            return ()
        device = self.model.device
        if self.taught is not None:
            answers = [take(taught, rows, device) for taught in self.taught]
        else:
            assert images is not None
            with torch.no_grad():
                answers = [_answer(teacher.eval(), images) for teacher in self.teachers]
        return tuple(Taught(embedding, logits[:, columns.to(device)])
                     for (embedding, logits), columns in zip(answers, self.columns, strict=True))


def with_labels(data: ImageData, classes: Sequence[str]) -> ImageData:
    """The data with labels that count in a model's classes. Raises DataError without labels."""
    if data.labels is None:
        raise DataError("these images have no labels, and labels are what is learnt from here")
    return data if tuple(data.classes) == tuple(classes) else data.with_classes(classes)


def _answer(teacher: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    features = teacher.trunk(images.to(teacher.device))
    embedding = teacher.join(features)
    return embedding, teacher.classify(embedding)


def _columns(teacher: Model, classes: Sequence[str]) -> Tensor:
    """Where a teacher has each of the student's classes. Raises DataError when it lacks one."""
    place = {name: index for index, name in enumerate(teacher.classes)}
    missing = [name for name in classes if name not in place]
    if missing:
        raise DataError(f"a teacher has no class {missing[0]!r}; it has {len(place)} classes, "
                        f"the student {len(classes)}, and the student's must be among them")
    return torch.tensor([place[name] for name in classes])
