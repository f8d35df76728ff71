"""The namespace `timm`: every architecture and every pretrained tag, known without importing timm.

timm itself is asked once per version, in a process of its own, and its answer is cached.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib import metadata
from typing import Any

from zoo.cache import cache_folder, read_json, write_json
from zoo.errors import PluginError
from zoo.hookspecs import hookimpl
from zoo.specs import BackboneSpec, Catalog

_BUILD = "zoo.backbones.timm_build:build"
_FORMAT = 1


@hookimpl
def zoo_catalog() -> Catalog:
    return TimmCatalog()


class TimmCatalog:
    """`find` and `search` by timm's own names: `resnet18`, `resnet18.a1_in1k`."""

    @cached_property
    def _entries(self) -> Mapping[str, Any]:
        version = metadata.version("timm")
        file = cache_folder() / f"timm-{version}.json"
        cached = read_json(file)
        if cached is None or cached.get("format") != _FORMAT:
            cached = _ask_timm()
            write_json(file, cached)
        return cached

    def find(self, name: str) -> BackboneSpec | None:
        """The spec of an architecture or of one of its tags; an architecture alone means its
        default tag, and a deprecated name the one that took its place."""
        name = self._entries["deprecated"].get(name, name)
        name = self._entries["defaults"].get(name, name)
        config = self._entries["models"].get(name)
        if config is None:
            return None
        return BackboneSpec(
            name=name, build=_BUILD, input_size=tuple(config["input_size"]),
            license=config["license"], paper=config["paper"], weights=config["weights"],
            summary=config["summary"],
        )

    def search(self, pattern: str) -> list[str]:
        """Architectures and tagged names. A pattern without a tag also means every tag."""
        patterns = [pattern] if "." in pattern else [pattern, f"{pattern}.*"]
        names = dict.fromkeys([*self._entries["defaults"], *self._entries["models"]])
        return [name for each in patterns for name in fnmatch.filter(names, each)
                if each == pattern or not fnmatch.fnmatchcase(name, pattern)]


def _ask_timm() -> dict[str, Any]:
    """timm's own catalogue, read in another process: importing timm takes seconds."""
    asked = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True,
                           check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise PluginError("timm", "timm", f"it cannot list its models: {reason}")
    answer: dict[str, Any] = json.loads(asked.stdout)
    return answer


def _catalogue() -> dict[str, Any]:
    import timm
    from timm.models import get_deprecated_models

    models = {}
    defaults = {}
    for architecture in timm.list_models():
        config = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
        if config is not None and config.tag:
            defaults[architecture] = f"{architecture}.{config.tag}"
    for name in timm.list_models(include_tags=True):
        config = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if config is None:
            models[name] = {"input_size": (3, 224, 224), "license": "", "paper": "", "weights": "",
                            "summary": ""}
            continue
        weights = f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else (config.url or "")
        models[name] = {
            "input_size": config.input_size, "license": config.license or "",
            "paper": ", ".join(config.paper_name or ()) if isinstance(
                config.paper_name, (list, tuple)) else config.paper_name or "",
            "weights": weights if config.has_weights else "",
            "summary": (config.description or "") if config.has_weights else "",
        }
    deprecated = {old: new for old, new in get_deprecated_models().items() if new}
    return {"format": _FORMAT, "models": models, "defaults": defaults, "deprecated": deprecated}


if __name__ == "__main__":
    json.dump(_catalogue(), sys.stdout)
