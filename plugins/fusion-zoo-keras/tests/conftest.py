"""Keras' folder and zoo's cache are the tests' own."""

from __future__ import annotations

import os
import tempfile

import pytest

# Keras reads it once, when it is first imported.
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp(prefix="keras-"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path_factory.getbasetemp() / "zoo-cache"))
    monkeypatch.setenv("ZOO_PROGRESS", "0")
