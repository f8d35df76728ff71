"""The plugins that are known to exist, from `known_plugins.json`: whose a namespace is when no
installed distribution has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class KnownPlugin:
    """distribution: what pip installs. reserved: no other distribution may have the namespace,
    because it is ours."""

    distribution: str
    summary: str = ""
    reserved: bool = False

    @property
    def install(self) -> str:
        return f"pip install {self.distribution}"


@cache
def known_plugins() -> Mapping[str, KnownPlugin]:
    """Namespace → plugin, in alphabetical order; without the core's own."""
    table = json.loads(Path(__file__).with_name("known_plugins.json").read_text("utf-8"))
    return MappingProxyType({namespace: KnownPlugin(**told) for namespace, told in table.items()})
