"""What only this machine knows, and nobody else's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zoo.names import is_path

# A path on this machine inside a text; what stands after `://` or inside `org/name` is none.
_PATH = re.compile(r"\b(?:local-dir|folder|csv|file):[^\s\"'|<>]+"
                   r"|(?<![\w.:/~<])(?:~[\w-]*|[A-Za-z]:(?=[\\/]))?[\\/][^\s\"'|<>]*")


def public(value: Any) -> Any:
    """The same without paths of this machine: of each the last part is left."""
    if isinstance(value, Mapping):
        return {public(key): public(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(each) for each in value]
    if not isinstance(value, str):
        return value
    if is_path(value) and len(value) > 1:
        return _last_part(value)
    return _PATH.sub(lambda match: _last_part(match[0]) if len(match[0]) > 1 else match[0], value)


def _last_part(path: str) -> str:
    return re.split(r"[\\/:]", path.rstrip("\\/"))[-1]
