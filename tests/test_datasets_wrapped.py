from __future__ import annotations

import gc
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import Compose, Normalize, ToTensor

from zoo.datasets import ImageData, load_data, loader
from zoo.errors import DataError


class Listed(Dataset[Any]):
    """A data set of the given items."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Streamed(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def grey(value: int, size: int = 4) -> Tensor:
    return torch.full((1, size, size), value, dtype=torch.uint8)


def picture(value: int, size: int = 8) -> Image.Image:
    return Image.new("RGB", (size, size), (value, 0, 255))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# torch's data sets


def test_tensor_dataset_stays_in_memory() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    data = load_data(TensorDataset(images, torch.tensor([3, 0, 1, 0, 1])))
    assert data.in_memory
    assert data.classes == ("0", "1", "2", "3")
    assert data.batch([0])[0].data_ptr() != images.data_ptr()
    assert torch.equal(data.batch(range(5))[0], images)
    assert load_data(TensorDataset(images, torch.zeros(5).long()), image_size=4)[0][0].shape[1] == 4
    assert load_data(TensorDataset(images[:, 0]), labelled=False)[0][0].shape == (1, 8, 8)


def test_large_floats_are_resized_within_the_unit_range() -> None:
    images = (torch.rand(2, 3, 16, 16) > 0.5).float()
    small = load_data(TensorDataset(images, torch.zeros(2).long()), image_size=6).batch([0, 1])[0]
    assert small.shape == (2, 3, 6, 6)
    assert 0 <= small.min() < small.max() <= 1


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels_pass_through(channels: int) -> None:
    images = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    items = Listed([(image, 0) for image in images])
    assert load_data(items, image_size=4).batch([0, 1])[0].shape == (2, channels, 4, 4)


def test_fake_data_with_and_without_transforms() -> None:
    plain = load_data(FakeData(6, (3, 10, 12), num_classes=4), image_size=8)
    images, labels = plain.batch(range(6))
    assert (images.dtype, images.shape) == (torch.uint8, (6, 3, 8, 8))
    assert labels.tolist() == [int(label) for _, label in FakeData(6, (3, 10, 12), num_classes=4)]
    floats = load_data(FakeData(6, (3, 10, 12), num_classes=4, transform=ToTensor()))
    assert floats.batch([0])[0].dtype == torch.float32
    assert torch.equal((floats[1][0] * 255).round().byte(), load_data(
        FakeData(6, (3, 10, 12), num_classes=4))[1][0])


def test_normalize_is_refused() -> None:
    transform = Compose([ToTensor(), Normalize((0.5,) * 3, (0.2,) * 3)])
    data = load_data(FakeData(6, (3, 8, 8), num_classes=4, transform=transform))
    with pytest.raises(DataError, match=r"image 4 has values from -2\.\d+ to 2\.\d+, expected "
                                        r"floats on \[0, 1\]: drop Normalize"):
        data.batch([4])


def test_image_folder_and_parts_of_it(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/2.png", "cat/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(10).save(tmp_path / name)
    folder = ImageFolder(str(tmp_path))
    assert load_data(folder).classes == ("cat", "dog")
    part = load_data(Subset(Subset(folder, [2, 1]), [0]))
    assert part.classes == ("cat", "dog")
    assert part.batch([0])[1].tolist() == [1]
    first, _ = random_split(folder, [2, 1])
    assert len(load_data(first)) == 2


def test_labels_are_not_read_from_items_when_they_are_listed() -> None:
    class Costly(Listed):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an image was read")

    for attributes in ({"targets": [0, 1]}, {"labels": np.array([0, 1])},
                       {"targets": ["x", "y"], "labels": torch.tensor([0, 1])}):
        data = load_data(Costly([None, None], **attributes))
        assert data.labels is not None
        assert data.labels.tolist() == [0, 1]


@pytest.mark.parametrize("attributes", [
    {"targets": [1, 1], "target_transform": abs},
    {"targets": [1, 1, 1]},
    {"targets": [0.5, 0.5]},
    {"targets": [[1, 2], [1, 2]]},
    {"targets": None},
])
def test_lists_that_are_no_labels_are_left_aside(attributes: dict[str, Any]) -> None:
    data = load_data(Listed([(grey(0), 0), (grey(0), 2)], **attributes))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 2]


def test_a_list_of_labels_that_is_wrong() -> None:
    data = load_data(Listed([(grey(0), 0), (grey(0), 1)], targets=[0, 0]))
    with pytest.raises(DataError, match=r"item 1 has the label 1, and the .* own list .* says 0"):
        data.batch([1])


def test_iterable_data_are_read_into_memory() -> None:
    data = load_data(Streamed([(picture(i, 8 + i), i % 2) for i in range(4)]), image_size=6)
    assert data.in_memory
    assert data.batch([0, 3])[0][:, 0, 0, 0].tolist() == [0, 3]
    assert data.batch([0, 3])[1].tolist() == [0, 1]
    with pytest.raises(DataError, match="the Streamed has no items"):
        load_data(Streamed([]))


def test_unlabelled_items() -> None:
    for items in ([grey(1), grey(2)], [(grey(1), "x"), (grey(2), None)]):
        data = load_data(Listed(items), labelled=False)
        assert data.labels is None
        assert data.batch([1])[0].max() == 2


@pytest.mark.parametrize(("item", "message"), [
    (grey(0), r"item 1 is a Tensor, expected \(image, label\); for images alone ask for unlab"),
    ((grey(0), 0.5), "item 1 has the label 0.5, expected a whole number"),
    ((grey(0), "cat"), "item 1 has the label 'cat', expected a whole number"),
    ((grey(0), -1), "image 1 has the label -1"),
    ((np.zeros((4, 4, 3)), 0), r"the image of item 1 is a ndarray, .*: add ToImage\(\)"),
    ((torch.zeros(4), 0), r"the image of item 1 is a Tensor of shape \[4\], expected a PIL image"),
    ((torch.zeros(1, 4, 4).int(), 0), "torch.int32, expected torch.uint8 on 0…255"),
    ((torch.full((1, 4, 4), 255.0), 0), "image 1 has values from 255 to 255"),
    ((Image.new("I;16", (4, 4)), 0), r"item 1: its pixels are 16-bit or float"),
])
def test_wrong_items(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(Listed([(grey(0), 0), item])).batch([1])


def test_a_data_set_without_length() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return grey(0), 0

    with pytest.raises(DataError, match="a Endless has no length: give it __len__, or make it an "):
        load_data(Endless())


def test_fingerprint_of_items_reads_some_of_them() -> None:
    items = Listed([(grey(i % 256), 0) for i in range(1000)])
    first = load_data(items)
    assert first.fingerprint() == load_data(items).fingerprint()
    brighter = Listed([(grey((i + 1) % 256), 0) for i in range(1000)])
    assert load_data(brighter).fingerprint() != first.fingerprint()
    assert load_data(items, image_size=3).fingerprint() != first.fingerprint()


# timm's readers


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """cat/1.png, cat/2.png and dog/10.png in photos.tar; the red channel is the number."""
    path = tmp_path / "photos.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("dog/10.png", "cat/2.png", "cat/1.png"):
            add(archive, name, png(picture(int(Path(name).stem))))
    return path


def test_tar_files_in_a_tar_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name, values in (("dog", (3, 4)), ("cat", (1, 2))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for value in values:
                    add(images, f"{value}.png", png(picture(value)))
            add(archive, f"{name}.tar", inner.getvalue())
    data = load_data(tmp_path / "all.tar")
    images, labels = data.batch(range(4))
    assert images[:, 0, 0, 0].tolist() == [1, 2, 3, 4]
    assert [data.classes[label] for label in labels] == ["cat", "cat", "dog", "dog"]


# Python from 3.12 on warns of a fork among threads, which torch's loaders do everywhere.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_tar_file(tar: Path) -> None:
    data = load_data(tar, image_size=4)
    assert data.classes == ("cat", "dog")
    images, labels = data.batch([0, 1, 2])
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert images[:, 2].min() == 255
    assert labels.tolist() == [0, 0, 1]
    batches = list(loader(data, batch_size=2, workers=2))
    assert torch.equal(torch.cat([x for x, _ in batches]), images)


def test_a_damaged_image_in_a_tar_is_not_replaced_by_the_next(tar: Path) -> None:
    with tarfile.open(tar, "a") as archive:
        archive.addfile(tarfile.TarInfo("cat/3.png"))
    with pytest.raises(DataError, match=r"photos\.tar: the image 'cat/3\.png' cannot be read"):
        load_data(tar).batch([2])


def test_a_damaged_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"timm cannot open 'tar:.*x\.tar': "):
        load_data(tmp_path / "x.tar")


@pytest.fixture
def mnist_files(tmp_path: Path) -> Path:
    """The files that torchvision's MNIST expects, with 3 and 2 images of random pixels."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    head = b"\0\0\x08"
    for prefix, labels in (("train", [5, 0, 9]), ("t10k", [7, 2])):
        pixels = np.random.RandomState(len(labels)).randint(0, 256, (len(labels), 28, 28), np.uint8)
        shape = b"".join(n.to_bytes(4, "big") for n in pixels.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(head + b"\3" + shape + pixels.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            head + b"\1" + len(labels).to_bytes(4, "big") + bytes(labels))
    return tmp_path


def test_torchvision_through_timm(mnist_files: Path) -> None:
    train = load_data(f"torch:mnist:{mnist_files}")
    assert train.labels is not None
    assert train.labels.tolist() == [5, 0, 9]
    assert train.classes[5] == "5 - five"
    image = train[1][0]
    expected = np.random.RandomState(3).randint(0, 256, (3, 28, 28), np.uint8)[1]
    assert torch.equal(image, torch.from_numpy(expected).expand(3, 28, 28))
    test = load_data(f"torch:mnist:{mnist_files}", role="test")
    assert test.batch([0, 1])[1].tolist() == [7, 2]
    assert len(load_data(f"torch:mnist:{mnist_files}", split="val")) == 2


@pytest.mark.parametrize(("given", "split", "message"), [
    ("torch:mnist", None, "'torch:mnist' does not say where it lies: write 'torch:mnist:FOLDER'"),
    ("torch:image_folder:x", None, "'torch:image_folder' is read as 'folder:x': write that"),
    ("torch:MNIST:{}", "tset", "'torch:mnist' has no split 'tset'; its splits are train, test"),
    ("torch:cifar10:{}", None, "torchvision finds no cifar10 there .*nothing is downloaded here"),
    ("torch:nothing:{}", None, "timm cannot open 'torch:nothing:.*Unknown torchvision dataset"),
    ("hfds:org/name", None, "'hfds:' needs the package 'datasets', .*: pip install datasets"),
    ("wds:{}/x.tar", None, "'wds:' needs the package 'webdataset', .*: pip install webdataset"),
])
def test_what_timm_cannot_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, split: str | None, message: str
) -> None:
    monkeypatch.setattr("zoo.datasets.wrapped.find_spec", lambda package: None)
    with pytest.raises(DataError, match=message):
        load_data(given.format(tmp_path), split=split)


def test_wrapped_data_split_like_any_other() -> None:
    data = load_data(Listed([(grey(i), i % 2) for i in range(10)]))
    assert isinstance(data, ImageData)
    rest, held_out = data.split(0.2)
    assert (len(rest), len(held_out)) == (8, 2)
    assert sorted(held_out.batch([0, 1])[1].tolist()) == [0, 1]


# webdataset leaves the shard open; it is closed, with a warning, by the collection below.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning",
                            "ignore::ResourceWarning")
def test_webdataset_shards_are_read_for_real(tmp_path: Path) -> None:
    digits = load_data("digits").take(20)
    with tarfile.open(tmp_path / "x-00.tar", "w") as archive:
        for number in range(len(digits)):
            image, label = digits[number]
            picture = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(picture, "png")
            for suffix, content in (("png", picture.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    data = load_data(f"wds:{tmp_path / 'x-00.tar'}", image_size=8)
    assert data.labels is not None
    assert digits.labels is not None
    assert data.labels.tolist() == digits.labels.tolist()
    images, _ = data.batch(range(20))
    assert torch.equal(images, digits.batch(range(20))[0].expand(-1, 3, -1, -1))
    gc.collect()
