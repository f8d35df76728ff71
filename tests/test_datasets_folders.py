from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

from zoo.datasets import load_data, loader
from zoo.errors import DataError


def picture(path: Path, height: int = 8, width: int = 8, mode: str = "RGB") -> Path:
    pixels = np.random.RandomState(height * width).randint(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders 2, 10 and deep/er, images of several formats and sizes, hidden files."""
    root = tmp_path / "photos"
    for name in ("2/a.png", "2/b.bmp", "10/c.png", "deep/er/d.png", ".hidden/e.png", "2/.f.png"):
        picture(root / name, 8, 9)
    (root / "2" / "notes.txt").write_text("not an image")
    return root


# Folders and files


def test_class_folders_in_natural_order(folder: Path) -> None:
    data = load_data(folder, image_size=8)
    assert data.classes == ("2", "10", "deep")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert data.batch(range(4))[0].shape == (4, 3, 8, 8)
    assert load_data(f"folder:{folder}", image_size=8).fingerprint() == data.fingerprint()


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (33, 33), (9, 20)])
def test_files_are_resized_and_cropped_as_torchvision_does(
    tmp_path: Path, height: int, width: int
) -> None:
    path = picture(tmp_path / "x" / "a.png", height, width)
    reference = Compose([Resize(24, InterpolationMode.BICUBIC), CenterCrop(24), PILToTensor()])
    with Image.open(path) as image:
        expected = reference(image)
    assert torch.equal(load_data(tmp_path, image_size=24)[0][0], expected)


def test_native_size_when_none_is_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "x" / "a.png", 5, 7)
    assert load_data(tmp_path)[0][0].shape == (3, 5, 7)
    picture(tmp_path / "x" / "b.png", 7, 5)
    with pytest.raises(DataError, match=r"differ in size \(3×5×7 and 3×7×5\): give image_size"):
        load_data(tmp_path).batch([0, 1])


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    picture(tmp_path / "x" / f"a.{suffix}", mode=mode)
    image = load_data(tmp_path)[0][0]
    assert image.shape == (3, 8, 8)
    if mode == "L":
        assert torch.equal(image[0], image[2])


def test_a_palette_with_alpha_gives_no_warning(tmp_path: Path) -> None:
    with Image.open(picture(tmp_path / "x" / "a.png", mode="P")) as image:
        image.save(tmp_path / "x" / "a.png", transparency=bytes(range(4)))
    assert load_data(tmp_path)[0][0].shape == (3, 8, 8)


def test_sixteen_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "x" / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*16-bit or float.*mode I;16.*8 bits per channel"):
        load_data(tmp_path).batch([0])


def test_an_unreadable_image_of_a_folder(folder: Path) -> None:
    (folder / "2" / "a.png").write_bytes(b"broken")
    data = load_data(folder, image_size=8)
    with pytest.raises(DataError, match=r"a\.png: the image cannot be read \(cannot identify"):
        data.batch([0])


def test_flat_folders_are_for_unlabelled_data(tmp_path: Path) -> None:
    stray = picture(tmp_path / "a.png")
    picture(tmp_path / "cats" / "b.png")
    data = load_data(tmp_path, labelled=False)
    assert len(data) == 2
    assert data.labels is None
    with pytest.raises(DataError, match="in no class folder: move it into one") as error:
        load_data(tmp_path)
    assert error.value.file == str(stray)


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="there are no images in this folder"):
        load_data(tmp_path)
    picture(tmp_path / "dogs" / "a.png")
    with pytest.raises(DataError, match="cats: there are no images in this class folder"):
        load_data(tmp_path)


def test_split_folders(tmp_path: Path) -> None:
    for name in ("train/cat/a.png", "train/dog/b.png", "val/cat/c.png"):
        picture(tmp_path / name)
    assert len(load_data(tmp_path)) == 2
    assert load_data(tmp_path, role="test").classes == ("cat",)
    assert len(load_data(tmp_path, split="val")) == 1
    with pytest.raises(DataError, match="no sub-folder 'vall'; did you mean 'val'"):
        load_data(tmp_path, split="vall")
    with pytest.raises(DataError, match="no sub-folder 'x'; there are train, val"):
        load_data(tmp_path, split="x")
    (tmp_path / "val").rename(tmp_path / ".val")
    with pytest.raises(DataError, match="sub-folders are train, expected one of test, val, valid"):
        load_data(tmp_path, role="test")


def test_train_may_be_a_class(tmp_path: Path) -> None:
    for name in ("train/a.png", "tractor/b.png"):
        picture(tmp_path / name)
    assert load_data(tmp_path).classes == ("tractor", "train")


def test_a_plain_string_that_exists_is_a_path(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert load_data("photos", image_size=8).classes == ("2", "10", "deep")


# Python from 3.12 on warns of a fork among threads, which torch's loaders do everywhere.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_files_and_hand_over_errors(folder: Path) -> None:
    data = load_data(folder, image_size=8)
    alone = [(x.sum().item(), y.tolist()) for x, y in loader(data, batch_size=3)]
    helped = [(x.sum().item(), y.tolist()) for x, y in loader(data, batch_size=3, workers=1)]
    assert alone == helped
    (folder / "10" / "c.png").write_bytes(b"broken")
    with pytest.raises(DataError) as error:
        list(loader(data, batch_size=3, workers=1))
    assert error.value.file == str(folder / "10" / "c.png")
    assert "Traceback" not in str(error.value)


def test_fingerprint_of_files_follows_size_and_time(folder: Path) -> None:
    data = load_data(folder, image_size=8)
    first = data.fingerprint()
    assert load_data(folder, image_size=8).fingerprint() == first
    assert load_data(folder, image_size=4).fingerprint() != first
    os.utime(folder / "2" / "a.png", ns=(1, 1))
    assert data.fingerprint() != first
    (folder / "2" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: the image is gone"):
        data.fingerprint()
