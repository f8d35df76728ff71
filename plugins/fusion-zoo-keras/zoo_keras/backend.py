"""Keras, on torch: its backend is chosen once in a process, before it is first imported."""

from __future__ import annotations

import os
import sys

from zoo.errors import PluginError

_REMEDY = ("start a new process with KERAS_BACKEND=torch, or leave it unset and use zoo before "
           "you import keras")


def _choose() -> None:
    given = os.environ.setdefault("KERAS_BACKEND", "torch")
    if "keras" in sys.modules:
        given = sys.modules["keras"].config.backend()
    if given != "torch":
        raise PluginError("keras", "fusion-zoo-keras",
                          f"Keras runs on {given!r} here, expected 'torch'; {_REMEDY}")


_choose()

import keras  # noqa: E402

__all__ = ["keras"]
