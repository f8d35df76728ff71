from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from zoo import registry
from zoo.datasets import ImageData, index_batches, load_data, loader, to_unit
from zoo.errors import BadName, DataError, UnknownName
from zoo.specs import DatasetSpec


@pytest.fixture
def hundred() -> ImageData:
    """100 images whose pixels are their number; 50, 30 and 20 of three classes."""
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 1, 4, 4)
    return ImageData(images, [0] * 50 + [1] * 30 + [2] * 20, ["a", "b", "c"])


def numbers(data: ImageData) -> list[int]:
    return data.batch(range(len(data)))[0][:, 0, 0, 0].tolist()


# ImageData


def test_batches_and_items_in_memory(hundred: ImageData) -> None:
    images, labels = hundred.batch([99, 0, 50])
    assert images.dtype == torch.uint8
    assert images.shape == (3, 1, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [99, 0, 50]
    assert labels.tolist() == [2, 0, 1]
    image, label = hundred[50]
    assert image.shape == (1, 4, 4)
    assert (int(image[0, 0, 0]), label) == (50, 1)
    assert hundred[-1][1] == 2
    assert len(list(hundred)) == len(hundred) == 100
    assert hundred.classes == ("a", "b", "c")


def test_subsets_of_subsets_keep_order_and_labels(hundred: ImageData) -> None:
    part = hundred.subset([90, 10, 60, 20]).subset(torch.tensor([2, 0]))
    assert numbers(part) == [60, 90]
    assert part.labels is not None
    assert part.labels.tolist() == [1, 2]
    assert part.classes == ("a", "b", "c")
    with pytest.raises(DataError, match="no images in this subset"):
        hundred.subset([])


def test_split_is_stratified_and_a_partition(hundred: ImageData) -> None:
    rest, held_out = hundred.split(0.1, seed=3)
    assert sorted(numbers(rest) + numbers(held_out)) == list(range(100))
    assert held_out.labels is not None
    assert held_out.labels.bincount().tolist() == [5, 3, 2]
    assert numbers(hundred.split(0.1, seed=3)[1]) == numbers(held_out)
    assert numbers(hundred.split(0.1, seed=4)[1]) != numbers(held_out)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 0.004, -1])
def test_split_refuses_an_empty_side(hundred: ImageData, fraction: float) -> None:
    with pytest.raises(DataError, match=rf"cannot hold out {fraction} of 100 images"):
        hundred.split(fraction)


def test_take_is_stratified_and_always_the_same(hundred: ImageData) -> None:
    part = hundred.take(11, seed=0)
    assert part.labels is not None
    counts = part.labels.bincount().tolist()
    assert sum(counts) == 11
    assert all(abs(count - share) < 1 for count, share in zip(counts, (5.5, 3.3, 2.2), strict=True))
    assert numbers(part) == [8, 19, 34, 36, 42, 53, 63, 69, 84, 93, 96]
    assert hundred.take(100) is hundred
    assert len(hundred.without_labels().take(7)) == 7
    with pytest.raises(DataError, match="cannot take 0 images"):
        hundred.take(0)


def test_labels_can_be_taken_off(hundred: ImageData) -> None:
    blind = hundred.without_labels()
    assert blind.labels is None
    assert blind.classes == ()
    assert blind.batch([3, 4])[1].tolist() == [-1, -1]
    assert blind[3][1] == -1


def test_with_classes_counts_by_name(hundred: ImageData) -> None:
    moved = hundred.with_classes(["c", "extra", "a", "b"])
    assert moved.batch([0, 50, 99])[1].tolist() == [2, 3, 0]
    assert moved.classes == ("c", "extra", "a", "b")
    assert hundred.batch([0, 50, 99])[1].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"class 'b' that is not among the 2 classes .*\(a, bb\)"):
        hundred.with_classes(["a", "bb"])
    with pytest.raises(DataError, match="did you mean 'cats'"):
        ImageData(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [0], ["cat"]).with_classes(["cats"])
    with pytest.raises(DataError, match="have no labels"):
        hundred.without_labels().with_classes(["a"])


def test_floats_are_kept_as_float32() -> None:
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64)
    data = ImageData(images, [0, 1, 0])
    assert data.classes == ("0", "1")
    assert data.batch([0, 2])[0].dtype == torch.float32
    assert torch.equal(data.batch([0, 2])[0], images[[0, 2]].float())


@pytest.mark.parametrize(("value", "shown"), [(-2.118, "from -2.118 to"), (2.64, "to 2.64"),
                                              (float("nan"), "nan")])
def test_floats_outside_the_unit_range_are_named(value: float, shown: str) -> None:
    images = torch.full((5, 3, 2, 2), 0.5)
    images[3, 1, 0, 0] = value
    with pytest.raises(DataError, match=r"image 3 has values.*\[0, 1\]: drop Normalize") as error:
        ImageData(images, [0] * 5)
    assert shown in str(error.value)


@pytest.mark.parametrize(("images", "labels", "message"), [
    (torch.zeros(2, 3, 4, 4, dtype=torch.int64), [0, 0], "torch.int64, expected torch.uint8"),
    (torch.zeros(2, 4, 4), [0, 0], r"shape \[2, 4, 4\], expected \[N, C, H, W\]"),
    (torch.zeros(0, 3, 4, 4), [], "there are no images"),
    (torch.zeros(2, 3, 4, 4), [0], r"labels have shape \[1\], expected one for each of the 2"),
    (torch.zeros(2, 3, 4, 4), [0.0, 1.5], "labels are torch.float32, expected whole numbers"),
    (torch.zeros(2, 3, 4, 4), [0, 2], r"image 1 has the label 2, expected 0 to 1 \(x, y\)"),
    (torch.zeros(2, 3, 4, 4), [-1, 0], "image 0 has the label -1"),
])
def test_wrong_arrays(images: torch.Tensor, labels: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageData(images, labels, ["x", "y"])


def test_fingerprint_follows_what_is_in_the_data(hundred: ImageData) -> None:
    images, labels = hundred.batch(range(100))
    same = ImageData(images, labels, hundred.classes)
    assert same.fingerprint() == hundred.fingerprint()
    assert same.subset([4, 5]).fingerprint() == hundred.subset([4, 5]).fingerprint()
    changed = images.clone()
    changed[17, 0, 3, 3] += 1
    relabelled = labels.clone()
    relabelled[0] = 1
    different = [
        ImageData(changed, labels, hundred.classes), ImageData(images, relabelled, hundred.classes),
        ImageData(images, labels, ["a", "b", "d"]), hundred.without_labels(),
        hundred.subset([5, 4]), ImageData(images.view(100, 1, 2, 8), labels, hundred.classes),
    ]
    assert len({data.fingerprint() for data in (hundred, *different)}) == 7


# Loader


def seen(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_index_batches() -> None:
    assert index_batches(7, 3, shuffle=False) == [[0, 1, 2], [3, 4, 5], [6]]
    assert index_batches(7, 3, shuffle=False, drop_last=True) == [[0, 1, 2], [3, 4, 5]]
    first = index_batches(50, 8, shuffle=True, seed=1, epoch=2)
    assert sorted(seen(first)) == list(range(50))
    assert first == index_batches(50, 8, shuffle=True, seed=1, epoch=2)
    others = [index_batches(50, 8, shuffle=True, seed=s, epoch=e) for s, e in ((1, 3), (2, 1))]
    assert all(first != other for other in others)
    with pytest.raises(DataError, match="batch_size is 0, expected 1 or more"):
        index_batches(7, 0, shuffle=False)


def test_loader_covers_the_data_once(hundred: ImageData) -> None:
    batches = loader(hundred, batch_size=32, shuffle=True, seed=5, epoch=1)
    assert len(batches) == 4
    first = list(batches)
    again = list(loader(hundred, batch_size=32, shuffle=True, seed=5, epoch=1))
    assert [len(labels) for _, labels in first] == [32, 32, 32, 4]
    assert sorted(torch.cat([x[:, 0, 0, 0] for x, _ in first]).tolist()) == list(range(100))
    assert all(torch.equal(x, z) and torch.equal(y, w)
               for (x, y), (z, w) in zip(first, again, strict=True))


def test_loader_of_some_images(hundred: ImageData) -> None:
    batches = list(loader(hundred, batch_size=2, indices=[70, 3, 99], drop_last=True))
    assert [x[:, 0, 0, 0].tolist() for x, _ in batches] == [[70, 3]]
    shuffled = loader(hundred, batch_size=3, indices=torch.tensor([70, 3, 99]), shuffle=True)
    assert sorted(next(iter(shuffled))[0][:, 0, 0, 0].tolist()) == [3, 70, 99]


def test_arrays_need_no_workers(hundred: ImageData) -> None:
    assert loader(hundred, batch_size=2, workers=4).num_workers == 0


def test_to_unit_divides_by_255_exactly() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    expected = np.arange(256, dtype=np.float32) / np.float32(255)
    assert np.array_equal(to_unit(pixels).numpy(), expected)
    assert to_unit(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float32


# Opening


def test_image_data_is_itself(hundred: ImageData) -> None:
    assert load_data(hundred) is hundred
    assert load_data(hundred, labelled=False).labels is None
    assert numbers(load_data(hundred, limit=11)) == numbers(hundred.take(11))
    with pytest.raises(DataError, match="no labels, and labels are needed"):
        load_data(hundred.without_labels())


def test_paths_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(DataError, match=r"trian\.csv: there is no such .*mean 'train\.csv'"):
        load_data("trian.csv")
    for given in ("./nowhere", "folder:nowhere", Path("nowhere"), "csv:nowhere", "csv:no.csv"):
        with pytest.raises(DataError, match="there is no such file or folder") as error:
            load_data(given)
        assert error.value.file in ("nowhere", "no.csv")


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_text("")
    with pytest.raises(DataError, match=r"data\.xlsx: expected a folder, or a file that ends in"):
        load_data(tmp_path / "data.xlsx")


def test_things_that_are_no_data(hundred: ImageData) -> None:
    with pytest.raises(DataError, match="data is a ndarray, expected a name, a path"):
        load_data(np.zeros(3))
    with pytest.raises(DataError, match=r"data is a DataLoader, .*: give its \.dataset"):
        load_data(DataLoader(hundred))
    with pytest.raises(DataError, match=r"'hf-hub:org/name' is the address of a model"):
        load_data("hf-hub:org/name")
    with pytest.raises(BadName, match="did you mean 'folder'"):
        load_data("foldr:photos")
    with pytest.raises(BadName, match="empty"):
        load_data("")


# Registered names


@pytest.fixture
def leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered data set with three splits, built by this module."""
    spec = DatasetSpec(name="acme/leaves", build=f"{__name__}:build_leaves",
                       splits=("fit", "check", "final"))

    def find(name: str, kind: type[DatasetSpec]) -> DatasetSpec:
        if name in ("leaves", "acme/leaves"):
            return spec
        if name == "ties":
            raise UnknownName(name, "dataset", hint="zoo/ties is a fusion")
        raise UnknownName(name, "dataset", ["acme/leaves"] if "leav" in name else [])

    monkeypatch.setattr(registry, "find", find)


class Leaves(Dataset[tuple[torch.Tensor, int]]):
    classes = ("fit", "check", "final")

    def __init__(self, split: str) -> None:
        self.label = self.classes.index(split)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.zeros(3, 6, 6, dtype=torch.uint8), self.label


def build_leaves(*, split: str) -> Dataset[tuple[torch.Tensor, int]]:
    if split == "check":
        return ImageData(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), [1, 1], Leaves.classes)
    return Leaves(split)


@pytest.mark.usefixtures("leaves")
def test_role_and_split_of_registered_data() -> None:
    assert load_data("acme/leaves")[0][1] == 0
    assert load_data("leaves", role="test", image_size=4)[0][0].shape == (3, 4, 4)
    assert load_data("leaves", role="test")[0][1] == 2
    assert load_data("leaves", role="test", split="check")[0][1] == 1
    assert load_data("leaves", split="check", image_size=4)[0][0].shape == (1, 4, 4)
    assert load_data("leaves", split="check", image_size=8)[0][0].shape == (1, 6, 6)
    with pytest.raises(DataError, match="acme/leaves has no split 'test'; its splits are fit, ch"):
        load_data("leaves", split="test")
    with pytest.raises(DataError, match="did you mean 'check'"):
        load_data("leaves", split="chek")


@pytest.mark.usefixtures("leaves")
def test_unknown_names() -> None:
    with pytest.raises(UnknownName, match=r"mean 'acme/leaves'\? [Tt]here is no file or folder of"):
        load_data("acme/leavs")
    with pytest.raises(UnknownName, match=r"'ties'; zoo/ties is a fusion"):
        load_data("ties")


def test_split_of_data_that_have_none(hundred: ImageData, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(DataError, match=r"split='val' was asked for, and .*a\.csv has no splits"):
        load_data(tmp_path / "a.csv", split="val")
    with pytest.raises(DataError, match="a Leaves has no splits"):
        load_data(Leaves("fit"), split="val")
