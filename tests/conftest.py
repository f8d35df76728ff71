"""Shared fixtures: a private cache folder, a fresh discovery, real distributions on the path."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from zoo import discovery

if TYPE_CHECKING:
    from hub import Hub


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's cache or plugin settings; the timm catalogue is built once."""
    folder = tmp_path_factory.getbasetemp() / "zoo-cache"
    monkeypatch.setenv("ZOO_CACHE", str(folder))
    shutil.rmtree(folder / "names", ignore_errors=True)
    shutil.rmtree(folder / "features", ignore_errors=True)
    monkeypatch.delenv("ZOO_CACHE_LIMIT", raising=False)
    monkeypatch.delenv("ZOO_FEATURES_DTYPE", raising=False)
    monkeypatch.setenv("ZOO_PROGRESS", "0")
    monkeypatch.delenv("ZOO_PLUGINS", raising=False)
    monkeypatch.delenv("ZOO_STRICT", raising=False)
    return folder


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """Install a distribution for one test: a module and a real `*.dist-info` on the path."""
    before = set(sys.modules)
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def _install(
        namespace: str, source: str, *, distribution: str = "", version: str = "1.0",
        module: str = "", editable: bool = False, folder: Path = site,
    ) -> Path:
        distribution = distribution or f"fusion-zoo-{namespace}"
        module = module or f"zoo_{namespace.replace('-', '_')}"
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[zoo.plugins]\n{namespace} = {module}\n")
        if editable:
            (info / "direct_url.json").write_text(
                '{"url": "file:///src", "dir_info": {"editable": true}}')
        discovery.reset()
        return folder / f"{module}.py"

    discovery.reset()
    yield _install
    for name in set(sys.modules) - before:
        if name.startswith("zoo_"):
            del sys.modules[name]
    discovery.reset()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on loopback that huggingface_hub talks to, in this process, logged out."""
    from hub import Hub
    from hub.client import connect

    with Hub() as running:
        connect(running, tmp_path / "hf", monkeypatch)
        yield running


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes over data networks made; the pass itself is the real one."""
    from zoo import features

    passes: list[int] = []
    extract: Callable[..., object] = features.extract

    def counted(*args: object, **options: object) -> object:
        passes.append(1)
        return extract(*args, **options)

    monkeypatch.setattr(features, "extract", counted)
    return passes
