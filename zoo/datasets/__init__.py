"""Data sets: CSV files, folders, torch's data sets, timm's readers, and the core's own by name.

`load_data` opens what the user names; `ImageData` is what it gives; `loader` batches it.
"""

from __future__ import annotations

from zoo.datasets.batches import Batches, index_batches, loader, to_unit
from zoo.datasets.images import NO_LABEL, ImageData
from zoo.datasets.joining import join
from zoo.datasets.opening import load_data, public_name

__all__ = [
    "NO_LABEL",
    "Batches",
    "ImageData",
    "index_batches",
    "join",
    "load_data",
    "loader",
    "public_name",
    "to_unit",
]
