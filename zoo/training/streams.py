"""The batches of an epoch: images, or what a frozen trunk and the teachers say of them, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from zoo.datasets import NO_LABEL, Batches, ImageData, index_batches, to_unit
from zoo.errors import DataError, TrainingError
from zoo.features import Features, Given, can_hold, given_once, take, trunk_features
from zoo.model import Model
from zoo.training.augmentation import augmented
from zoo.training.cutting import Cut
from zoo.training.settings import Settings
from zoo.transfers.objective import Batch, Taught


class Stream:
    """The same data epoch after epoch, in an order that depends on (seed, epoch) alone.

    frozen: the model's trunk does not change, so its features are computed here, once, where there
    is room for them; cut: where its partly frozen networks are entered, so that what they give up
    to there is computed once in the same way. The teachers' answers are too. With augmentation all
    of this is for each of the settings' `views`, if it has any. matched: the teachers' logits are
    put into the order of the model's classes. rank, world: of several processes, which take turns
    at the batches; without `shuffled` each has them all. features: those of these images, where
    they are there already.
    """

    steps: int
    first: Batch

    def __init__(
        self, model: Model, data: ImageData, settings: Settings, target: ImageData | None = None,
        teachers: Sequence[Model] = (), *, frozen: bool = False, cut: Cut | None = None,
        shuffled: bool = True, matched: bool = True, rank: int = 0, world: int = 1,
        features: Features | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.target = target
        self.teachers = teachers
        self.shuffled = shuffled
        self.rank, self.world = rank, world
        self.data = counted_in(model.classes, data)
        self.labels = (torch.full((len(data),), NO_LABEL) if self.data.labels is None
                       else self.data.labels)
        self.columns = [_columns(teacher, model.classes) if matched else slice(None)
                        for teacher in teachers]
        self.size = max(each.image_size for each in (model, *teachers))
        self.augments = shuffled and settings.augment is not None
        copies = (settings.views if self.augments else None) or 1
        self.frozen = frozen and can_hold(model, self.data, copies)
        # Target images go through the same networks, and these have nothing kept of them.
        self.cut = cut if cut and target is None and cut.fits(self.data, copies) else None
        # How many views of the images the epochs take in turn; None is a new one in each.
        self.views: int | None = 1
        if self.augments:
            self.views = settings.views if self.frozen or self.cut else None
        self.features: Features | None = None
        self.outputs: Features | None = None  # of the frozen layers, up to the cut
        self.taught: list[Features] | None = None
        self._kept: dict[int, tuple[Features | None, Features | None, list[Features]]] = {}
        if features is not None:
            self._kept[0] = features, None, []
        self._entered: Features | None = None
        if not self.augments:
            self._turn_to(0)
        batches = len(self._order(0))
        self.steps = batches // world if shuffled else batches
        if self.steps == 0:
            raise TrainingError(f"{len(self.data)} images are {batches} batch(es) of "
                                f"{settings.batch_size}, fewer than the {world} processes; "
                                "make batch_size smaller")
        self.images = min(len(self.data), self.steps * settings.batch_size)

    def epoch(self, epoch: int, phase: int) -> Iterator[Batch]:
        """The batches of one epoch of one phase, on the model's device."""
        number = 100_000 * phase + epoch
        order = self._order(number)
        if self.shuffled:
            order = order[self.rank::self.world][:self.steps]
        device = self.model.device
        view = number
        if self.views is not None:
            view = epoch % self.views
            self._turn_to(view)
        targets = itertools.repeat(None) if self.target is None else self._targets(number)
        images: Iterator[Tensor | None] = itertools.repeat(None)
        if self.features is None and not (self.outputs and self.cut and self.cut.whole):
            images = self._images(self._augmented(self.data, view), order)
        for indices, pixels, unlabelled in zip(order, images, targets, strict=False):
            rows = torch.as_tensor(indices)
            batch = Batch(labels=self.labels[rows].to(device, non_blocking=True))
            if pixels is not None:
                batch.images = to_unit(pixels.to(device, non_blocking=True))
            if self.features is not None:
                batch.features = take(self.features, rows, device)
            if self.outputs is not None:
                self._entered = take(self.outputs, rows, device)
                if batch.images is None:
                    batch.images = self._blank(len(rows))
            if unlabelled is not None:
                batch.unlabelled = to_unit(unlabelled.to(device, non_blocking=True))
            if self.teachers:
                batch.taught = self._taught(rows, batch.images)
            if indices is order[0]:
                self.first = batch
            yield batch

    def everything_taught(self) -> Iterator[tuple[Taught, ...]]:
        """What the teachers say of all images, in order and without augmentation."""
        for indices in index_batches(len(self.data), self.settings.batch_size, shuffle=False):
            images = None
            if self.taught is None:
                images = to_unit(self.data.batch(indices)[0].to(self.model.device))
            yield self._taught(torch.as_tensor(indices), images)

    def entering(self) -> AbstractContextManager[object]:
        """While the model is asked about the batch that came last: its partly frozen networks begin
        where they are cut."""
        if self.cut is None or self._entered is None:
            return nullcontext()
        return self.cut.entered(self._entered)

    def _turn_to(self, view: int) -> None:
        """Have at hand what is computed once, of the data or of one view of them."""
        if view not in self._kept:
            data = self._augmented(self.data, view)
            workers = self.settings.workers
            self._kept[view] = (
                trunk_features(self.model, data, workers=workers) if self.frozen else None,
                self.cut.outputs(data, workers) if self.cut else None,
                [_computed_once(teacher, data, self.settings) for teacher in self.teachers])
        self.features, self.outputs, self.taught = self._kept[view]

    def _blank(self, count: int) -> Tensor:
        """Images that nobody looks at."""
        side = self.model.image_size
        return torch.zeros(1, device=self.model.device).expand(count, 3, side, side)

    def _order(self, epoch: int) -> list[list[int]]:
        size = self.settings.batch_size
        # A batch of one image has no statistics for batch norm.
        single = self.shuffled and len(self.data) > size and len(self.data) % size == 1
        return index_batches(len(self.data), size, shuffle=self.shuffled, seed=self.settings.seed,
                             epoch=epoch, drop_last=single)

    def _images(self, data: ImageData, order: list[list[int]]) -> Iterator[Tensor]:
        if self.settings.workers == 0 or data.in_memory:
            return (data.batch(indices)[0] for indices in order)  # without a loader's overhead
        return (images for images, _ in Batches(data, order, self.settings.workers))

    def _augmented(self, data: ImageData, epoch: int) -> ImageData:
        if not self.augments:
            return data
        assert self.settings.augment is not None
        return augmented(data, self.settings.augment, self.size, (self.settings.seed, epoch))

    def _targets(self, epoch: int) -> Iterator[Tensor]:
        """Target images without end, in batches as large as the source's."""
        assert self.target is not None
        size = min(self.settings.batch_size, len(self.target))
        for turn in itertools.count():
            number = 1_000 * epoch + turn
            order = index_batches(len(self.target), size, shuffle=True, drop_last=True,
                                  seed=self.settings.seed, epoch=number)
            yield from self._images(self._augmented(self.target, number),
                                    order[self.rank::self.world] or order)

    def _taught(self, rows: Tensor, images: Tensor | None) -> tuple[Taught, ...]:
        taught = []
        for number, (teacher, columns) in enumerate(zip(self.teachers, self.columns, strict=True)):
            with torch.no_grad():
                if self.taught is None:
                    assert images is not None
                    embedding, logits = _answer(teacher, images.to(teacher.device))
                elif _is_joined_here(teacher):
                    embedding = teacher.join(take(self.taught[number], rows, teacher.device))
                    logits = teacher.classify(embedding)
                else:
                    embedding, logits = take(self.taught[number], rows, teacher.device)
            device = self.model.device
            taught.append(Taught(embedding.to(device), logits[:, columns].to(device)))
        return tuple(taught)


def counted_in(classes: Sequence[str], data: ImageData) -> ImageData:
    """The data with labels, where there are any, that count in a model's classes."""
    if data.labels is None or tuple(data.classes) == tuple(classes):
        return data
    return data.with_classes(classes)


def _computed_once(teacher: Model, data: ImageData, settings: Settings) -> Features:
    """A teacher's features of all images; its embedding and logits where these need more, or
    less room."""
    if _is_joined_here(teacher):
        return trunk_features(teacher, data, workers=settings.workers)
    answers = Given(teacher.name, [teacher.describe(), "answers"], teacher.state_dict(),
                    lambda images: torch.cat(_answer(teacher, images), dim=1))
    (both,) = given_once(teacher, data, [answers], description="teacher",
                         workers=settings.workers)
    return both[:, :teacher.dim], both[:, teacher.dim:]


def _is_joined_here(teacher: Model) -> bool:
    return teacher.splits and teacher.takes == "vectors"


def _answer(teacher: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    embedding = teacher.embed(images)
    return embedding, teacher.classify(embedding) if teacher.splits else teacher(images)


def _columns(teacher: Model, classes: Sequence[str]) -> list[int]:
    """Where a teacher has each of the student's classes. Raises DataError when it lacks one."""
    place = {name: index for index, name in enumerate(teacher.classes)}
    missing = [name for name in classes if name not in place]
    if missing:
        raise DataError(f"a teacher has no class {missing[0]!r}; it has {len(place)} classes, "
                        f"the student {len(classes)}, and the student's must be among them")
    return [place[name] for name in classes]
