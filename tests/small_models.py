"""Tiny models for the Hub's tests, built once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import zoo


@functools.cache
def fused() -> zoo.Model:
    """Two networks of timm's, their weights averaged: a plain timm model."""
    return zoo.fuse([zoo.backbone("test_vit", num_classes=3, image_size=32, seed=seed,
                                  device="cpu") for seed in (1, 2)], "average")


@functools.cache
def _folder() -> Path:
    return zoo.save(fused(), Path(tempfile.mkdtemp()) / "fused")


def saved(folder: Path) -> Path:
    """A copy of `fused` as a folder."""
    folder.mkdir(parents=True)
    for file in _folder().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
