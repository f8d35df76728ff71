"""A saved model's config, without building it: no torch, no plugin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.errors import FormatError


def saved_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder. Raises FormatError when there is none to read."""
    file = folder / "config.json"
    if not file.is_file():
        raise FormatError(folder, "is no saved model: it has no config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise FormatError(file, f"is damaged: {error}") from None
    if not isinstance(config, dict):
        raise FormatError(file, "is damaged: it is no JSON object")
    return config
