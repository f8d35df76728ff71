"""The data of a recipe, opened before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zoo.datasets import ImageData, load_data
from zoo.errors import ZooError
from zoo.merge_files.documents import Place, Problem
from zoo.names import Name, parse
from zoo.pipeline.recipes import Data, Recipe
from zoo.registry import find
from zoo.specs import BackboneSpec
from zoo.store import load


@dataclass(frozen=True, kw_only=True)
class RecipeData:
    """Every stage learns from train, is chosen on val and measured on test, whose classes are
    those of train. source: labelled images of the source's own. unlabelled: images of the
    target."""

    train: ImageData
    val: ImageData
    test: ImageData
    source: ImageData | None
    unlabelled: ImageData | None

    @property
    def sizes(self) -> dict[str, int]:
        """How many images each part has."""
        parts = {"train": self.train, "val": self.val, "test": self.test, "source": self.source,
                 "unlabelled": self.unlabelled}
        return {name: len(part) if part else 0 for name, part in parts.items()}


def open_data(recipe: Recipe) -> RecipeData:
    """Open all data of a recipe. Raises RecipeError with the line and field of each problem."""
    opening = _Opening(recipe)
    target, source = recipe.data.target, recipe.data.source
    train = opening.open(("target", "train"), target.train)
    test = opening.open(("target", "test"), target.test, role="test")
    own = opening.open(("source", "train"), source.train) if source else None
    unlabelled = opening.open(("target", "unlabelled"), target.unlabelled, labelled=False) \
        if target.unlabelled else None
    if isinstance(target.val, Data):
        val = opening.open(("target", "val"), target.val)
    else:
        train, val = opening.split(train, target.val)
    opening.want_apart()
    test = opening.counted(("target", "test"), test, train)
    val = opening.counted(("target", "val"), val, train)
    if opening.problems or train is None or val is None or test is None:
        raise recipe.error(opening.problems)
    return RecipeData(train=train, val=val, test=test, source=own, unlabelled=unlabelled)


class _Opening:
    """Opens one part after another and keeps what goes wrong."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.problems: list[Problem] = []
        self.size = max(_sizes(recipe))

    def open(
        self, field: Place, given: Data, *, role: str = "train", labelled: bool = True,
        whole: bool = False,
    ) -> ImageData | None:
        try:
            return load_data(
                self.recipe.data_place(given.data), split=given.split, image_size=self.size,
                role="test" if role == "test" else "train", labelled=labelled,
                limit=None if whole else given.limit, seed=given.seed)
        except ZooError as error:
            self.problems.append((("data", *field), str(error)))
            return None

    def split(
        self, train: ImageData | None, share: float
    ) -> tuple[ImageData | None, ImageData | None]:
        if train is None:
            return None, None
        try:
            return train.split(share, seed=self.recipe.seed)
        except ZooError as error:
            self.problems.append((("data", "target", "val"), str(error)))
            return None, None

    def counted(
        self, field: Place, part: ImageData | None, train: ImageData | None
    ) -> ImageData | None:
        """The part with labels that count in the training data's classes."""
        if part is None or train is None:
            return None
        try:
            return part.with_classes(train.classes)
        except ZooError as error:
            self.problems.append((("data", *field), str(error)))
            return None

    def want_apart(self) -> None:
        """The same images may not be in two roles, whatever part of them is drawn for each."""
        target = self.recipe.data.target
        roles = [(name, given) for name, given in
                 (("train", target.train), ("val", target.val), ("test", target.test))
                 if isinstance(given, Data)]
        for position, (name, given) in enumerate(roles):
            for other, like in roles[:position]:
                if given.data == like.data and self._same(name, given, other, like):
                    self.problems.append((("data", "target", name), (
                        f"these are the images of data.target.{other}; training, validation and "
                        "test need images of their own (a share as 'val' is held out of 'train')"
                    )))

    def _same(self, name: str, given: Data, other: str, like: Data) -> bool:
        if self.problems:
            return False
        one = self.open(("target", name), given, role=name, whole=True)
        two = self.open(("target", other), like, role=other, whole=True)
        return one is not None and two is not None and one.fingerprint() == two.fingerprint()


def _sizes(recipe: Recipe) -> Iterator[int]:
    """The side of the square that each network of a recipe looks at."""
    for part in (recipe.source, recipe.target, recipe.baseline):
        yield part.image_size or _size(recipe.model_place(part.backbone))
    for _, fusion in recipe.fuse.fusions(()):
        for _, other in fusion.others:
            yield _size(recipe.model_place(other))


def _size(place: str) -> int:
    if isinstance(parse(place), Name):
        return find(place, BackboneSpec).input_size[1]
    return load(place, device="cpu").image_size
