"""Keras, on torch: its backend is chosen once in a process, before it is first imported."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from zoo.errors import PluginError


def _choose() -> None:
    given = os.environ.setdefault("KERAS_BACKEND", "torch")
    if "keras" in sys.modules:
        given = sys.modules["keras"].config.backend()
    if given != "torch":
        raise PluginError(
            "keras", "fusion-zoo-keras", f"Keras runs on {given!r} here, expected 'torch'; start a "
            "new process with KERAS_BACKEND=torch, which Keras reads when it is first imported")


_choose()

import keras  # type: ignore[import-untyped]  # noqa: E402
import torch  # noqa: E402


@contextmanager
def building() -> Iterator[None]:
    """Build on the CPU, channels last, with random weights from torch's generator: Keras draws its
    initialisers' seeds from Python's."""
    layout = keras.config.image_data_format()
    state = random.getstate()
    random.seed(int(torch.randint(2**31, ())))
    keras.config.set_image_data_format("channels_last")
    try:
        with keras.device("cpu"), warnings.catch_warnings():
            # Whoever asks for other channels knows it.
            warnings.filterwarnings("ignore", message="This model usually expects 1 or 3 input")
            yield
    finally:
        keras.config.set_image_data_format(layout)
        random.setstate(state)


__all__ = ["building", "keras"]
