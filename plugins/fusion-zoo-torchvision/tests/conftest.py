"""A private cache folder: no test sees the user's, and the catalogue is built once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "zoo-cache"
    monkeypatch.setenv("ZOO_CACHE", str(folder))
    monkeypatch.setenv("ZOO_PROGRESS", "0")
    monkeypatch.delenv("ZOO_PLUGINS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    return folder
