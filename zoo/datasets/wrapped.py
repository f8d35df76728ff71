"""Other people's data sets: torch's `Dataset`, and what timm's readers open."""

from __future__ import annotations

import io
import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from zoo.datasets.fitting import fit_picture, fit_tensor, shrink
from zoo.datasets.images import ImageData, checked, stack
from zoo.errors import DataError

_SAMPLED = 256  # items in a fingerprint: to read all would cost as much as an epoch
_TRAIN = ("train", "training")
_TEST = ("test", "val", "valid", "validation", "eval", "evaluation")
_BASIC = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")


class Items:
    """A Source over a random-access data set whose items are (image, label) or images."""

    sampled = True  # `states` reads no more than _SAMPLED of them

    def __init__(self, dataset: Dataset[Any], size: int | None, labels: Tensor | None) -> None:
        self.dataset, self.size, self.labels = dataset, size, labels

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, index: int) -> Tensor:
        item = self.dataset[index]
        if self.labels is not None and _label(item, index) != int(self.labels[index]):
            raise DataError(f"item {index} has the label {_label(item, index)}, and the data set's "
                            f"own list of labels says {int(self.labels[index])}")
        return _image(item, self.size, index)  # (C, H, W)

    def states(self, indices: Sequence[int]) -> Iterator[bytes]:
        for index in indices[:: math.ceil(len(indices) / _SAMPLED)]:
            image = self[index]
            yield repr((image.shape, image.dtype)).encode() + image.numpy().tobytes()


def wrap(dataset: Dataset[Any], *, image_size: int | None, labelled: bool) -> ImageData:
    """Any torch `Dataset` of (image, label): a PIL image, uint8 [C, H, W] or floats on [0, 1].

    A TensorDataset stays in memory, an IterableDataset is read into it. Labels come from
    `targets` or `labels` where the data set has them, otherwise from reading every item once.
    Raises DataError naming the item that is not so.
    """
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) <= 2:
        return _in_memory(dataset, image_size, labelled)
    classes = _classes(dataset)
    if isinstance(dataset, IterableDataset):
        return _read_all(dataset, image_size, labelled, classes)
    if not hasattr(dataset, "__len__"):
        raise DataError(f"a {type(dataset).__name__} has no length: give it __len__, or make it an "
                        "IterableDataset")
    n = len(cast(Sized, dataset))
    if not labelled:
        return ImageData(Items(dataset, image_size, None))
    labels = _listed_labels(dataset)
    if labels is None:
        labels = torch.tensor([_label(dataset[index], index) for index in range(n)])
    return ImageData(Items(dataset, image_size, labels), labels, classes)


def open_with_timm(
    scheme: str, location: str, *, split: str | None, role: str, image_size: int | None,
    labelled: bool,
) -> ImageData:
    """What timm's readers open; `split` is what they call it, `role` stands in for None.

    `hfds:NAME`: a data set of the Hugging Face Hub. `torch:NAME:FOLDER`: one of torchvision's,
    which must be there already. `wds:FOLDER` (with an `info.json`) or `wds:FOLDER/x-{00..09}.tar`:
    WebDataset shards, read into memory. `tar`: images in a tar file, by folder.
    Raises DataError when a package is missing or timm cannot open it.
    """
    opener = {"hfds": _open_hfds, "torch": _open_torch, "wds": _open_wds, "tar": _open_tar}[scheme]
    try:
        dataset = opener(location, split, role)
    except DataError:
        raise
    except Exception as error:  # every reader raises its own: AssertionError, RuntimeError, …
        raise DataError(f"timm cannot open '{scheme}:{location}': {error}") from error
    return wrap(dataset, image_size=image_size, labelled=labelled)


class _ReaderItems(Dataset[tuple[Image.Image, int]]):
    """timm's reader as a Dataset. (timm's own skips what it cannot read, and gives the next image
    in its place.)"""

    def __init__(self, reader: Any, classes: dict[str, int], targets: Iterable[int]) -> None:
        self.reader = reader
        self.classes = sorted(classes, key=lambda name: classes[name]) or None
        self.targets = list(targets)

    def __len__(self) -> int:
        return len(self.reader)

    def open(self, index: int) -> IO[bytes]:
        return cast(IO[bytes], self.reader[index][0])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            with self.open(index) as file, Image.open(file) as picture:
                picture.load()
                return picture, self.targets[index]
        except Exception as error:  # Pillow raises nearly anything for a damaged file
            raise DataError(f"the image {self.reader.filename(index)!r} cannot be read "
                            f"({error}): replace it", file=self.reader.root) from error


class _TarItems(_ReaderItems):
    """timm says where in the tar file an image lies. (Its reader would keep the file open, and
    share its position with the processes of a loader.)"""

    def open(self, index: int) -> IO[bytes]:
        info, _, inner = self.reader.samples[index]  # inner: a tar file in the tar file
        with Path(self.reader.root).open("rb") as file:
            file.seek(info.offset_data + (inner.offset_data if inner else 0))
            return io.BytesIO(file.read(info.size))


def _open_hfds(location: str, split: str | None, role: str) -> Dataset[Any]:
    _need("datasets", "hfds")
    from timm.data.readers.reader_factory import create_reader

    reader = create_reader(f"hfds/{location}", split=split or role)
    return _ReaderItems(reader, reader.class_to_idx, reader.iter_targets())


def _open_tar(location: str, split: str | None, role: str) -> Dataset[Any]:
    from timm.data.readers.reader_factory import create_reader

    reader = create_reader("", location, cache_tarinfo=False)
    return _TarItems(reader, reader.class_name_to_idx, reader.targets.tolist())


def _open_wds(location: str, split: str | None, role: str) -> Dataset[Any]:
    _need("webdataset", "wds")
    from timm.data.dataset_factory import create_dataset

    folder, shards = os.path.split(location) if ".tar" in location else (location, None)
    return cast(Dataset[Any], create_dataset("wds/", root=folder, split=split or shards or role))


def _open_torch(location: str, split: str | None, role: str) -> Dataset[Any]:
    from timm.data.dataset_factory import create_dataset

    name, _, folder = location.partition(":")
    if not folder:
        raise DataError(f"'torch:{location}' does not say where it lies: write "
                        f"'torch:{location}:FOLDER'")
    name = name.lower()  # as timm does
    if name in ("folder", "image_folder"):  # timm falls back to FOLDER itself for a missing split
        raise DataError(f"'torch:{name}' is read as 'folder:{folder}': write that")
    if name in _BASIC and split is not None and split not in (*_TRAIN, *_TEST):
        raise DataError(f"'torch:{name}' has no split {split!r}; its splits are train, test")
    chosen = split or ("train" if role == "train" else "validation")
    root = Path(folder).expanduser()
    try:
        return cast(Dataset[Any], create_dataset(f"torch/{name}", root=str(root), split=chosen))
    except RuntimeError as error:
        raise DataError(f"torchvision finds no {name} there ({error}): nothing is downloaded here, "
                        "let torchvision.datasets do it once with download=True",
                        file=root) from error


def _need(package: str, scheme: str) -> None:
    if find_spec(package) is None:
        raise DataError(f"'{scheme}:' needs the package {package!r}, which is not installed: "
                        f"pip install {package}")


def _in_memory(dataset: TensorDataset, image_size: int | None, labelled: bool) -> ImageData:
    images, *rest = dataset.tensors
    images = checked(images.unsqueeze(1) if images.ndim == 3 else images)  # (N, C, H, W)
    labels = rest[0] if rest and labelled else None
    return ImageData(shrink(images, image_size), labels, _classes(dataset))


def _read_all(
    dataset: IterableDataset[Any], size: int | None, labelled: bool, classes: Sequence[str] | None
) -> ImageData:
    images, labels = [], []
    for index, item in enumerate(dataset):
        images.append(_image(item, size, index))
        if labelled:
            labels.append(_label(item, index))
    if not images:
        raise DataError(f"the {type(dataset).__name__} has no items")
    return ImageData(stack(images), labels if labelled else None, classes)


def _classes(dataset: Any) -> Sequence[str] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", None)
    return [str(name) for name in classes] if classes is not None else None


def _listed_labels(dataset: Any) -> Tensor | None:
    """The data set's own list of labels; None where there is none that counts its items."""
    if isinstance(dataset, Subset):
        inner = _listed_labels(dataset.dataset)
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if getattr(dataset, "target_transform", None) is not None:
        return None  # the list holds the labels before the transform
    for name in ("targets", "labels"):
        try:
            labels = torch.as_tensor(getattr(dataset, name, None))
        except (TypeError, ValueError, RuntimeError):
            continue
        if labels.shape == (len(dataset),) and not labels.is_floating_point():
            return labels.to(torch.int64)
    return None


def _label(item: Any, index: int) -> int:
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"item {index} is a {type(item).__name__}, expected (image, label); for "
                        "images alone ask for unlabelled data")
    try:
        return operator.index(item[1])  # refuses 2.7, which int() would cut
    except TypeError:
        raise DataError(f"item {index} has the label {item[1]!r}, expected a whole number"
                        ) from None


def _image(item: Any, size: int | None, index: int) -> Tensor:
    image = item[0] if isinstance(item, tuple | list) else item
    if isinstance(image, Image.Image):
        try:
            return fit_picture(image, size)
        except DataError as error:
            raise DataError(f"item {index}: {error}") from None
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        shape = f" of shape {list(image.shape)}" if isinstance(image, Tensor) else ""
        raise DataError(f"the image of item {index} is a {type(image).__name__}{shape}, expected a "
                        "PIL image or a tensor [C, H, W]: add ToImage() or PILToTensor() to its "
                        "transforms")
    one = checked(image[None, None] if image.ndim == 2 else image[None], index)  # (1, C, H, W)
    return (one if size is None else fit_tensor(one, size))[0]  # (C, H, W)
