"""The namespace `timm`: every architecture and every pretrained tag, known without importing timm.

timm itself is asked once per version, in a process of its own, and its answer is cached.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zoo.cache import ask_once
from zoo.hookspecs import hookimpl
from zoo.names import natural
from zoo.specs import BackboneSpec, Catalog

if TYPE_CHECKING:
    from timm.models import PretrainedCfg

_BUILD = "zoo.backbones.timm_build:build"
_FORMAT = 2
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause",
         "cc-by-4.0": "CC-BY-4.0", "cc-by-nc-4.0": "CC-BY-NC-4.0", "unknown": ""}


@hookimpl
def zoo_catalog() -> Catalog:
    return TimmCatalog()


class TimmCatalog:
    """`find` and `search` by timm's own names: `resnet18`, `resnet18.a1_in1k`."""

    def find(self, name: str) -> BackboneSpec | None:
        """The spec of an architecture or of one of its tags, under its full name: an architecture
        alone means its default tag, and a deprecated name the one that took its place."""
        full = self._full_name(name)
        entry = self._answer["models"].get(full)
        if entry is None:
            return None
        older = (old for old, new in self._answer["deprecated"].items()
                 if self._full_name(new) == full)
        return BackboneSpec(name=full, build=_BUILD, aliases=tuple(older), **entry)

    def search(self, pattern: str) -> list[str]:
        """Architectures and tagged names, in natural order; an architecture's pattern also means
        every tag of it."""
        names = self._answer["names"]
        found = set(fnmatch.filter(names, pattern))
        if "." not in pattern:
            found.update(fnmatch.filter(names, f"{pattern}.*"))
        return [name for name in names if name in found]

    def _full_name(self, name: str) -> str:
        architecture, _, tag = name.partition(".")
        if architecture in self._answer["deprecated"]:
            architecture, _, default = self._answer["deprecated"][architecture].partition(".")
            name = ".".join(filter(None, (architecture, tag or default)))
        return str(self._answer["defaults"].get(name, name))

    @cached_property
    def _answer(self) -> Mapping[str, Any]:
        return ask_once("timm", "zoo.backbones.timm_catalog", _FORMAT)


def spdx(licence: str) -> str:
    """The SPDX identifier of a licence as timm spells it; one without an identifier stays."""
    return _SPDX.get(licence, licence)


def _catalogue() -> dict[str, Any]:
    """`models`: full name → fields of its spec; `defaults`: architecture → full name; `names`:
    both in natural order; `deprecated`: old name → new one."""
    import timm
    from timm.models import get_arch_pretrained_cfgs, get_deprecated_models

    models: dict[str, Any] = {}
    defaults = {}
    for architecture in timm.list_models():
        default = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
        if default is None:
            models[architecture] = {}
            continue
        for name, config in get_arch_pretrained_cfgs(architecture).items():
            models[name] = _entry(config)
        if default.tag:
            defaults[architecture] = f"{architecture}.{default.tag}"
    deprecated = {old: new for old, new in get_deprecated_models().items() if new}
    return {"format": _FORMAT, "models": models, "defaults": defaults, "deprecated": deprecated,
            "names": sorted({*models, *defaults}, key=natural)}


def _entry(config: PretrainedCfg) -> dict[str, Any]:
    """The fields of the spec of one pretrained tag."""
    _, height, width = config.input_size
    classes = f"{config.num_classes:,} classes" if config.num_classes else "no classifier"
    statistics = "; ".join(f"{name} {' '.join(f'{value:g}' for value in values)}"
                           for name, values in (("mean", config.mean), ("std", config.std)))
    papers = config.paper_ids or ()
    cited = [config.paper_name, *([papers] if isinstance(papers, str) else papers)]
    return {
        "input_size": config.input_size,
        "summary": f"{classes}, {height} × {width} pixels, {config.interpolation}; {statistics}",
        "license": spdx(config.license or ""),
        "paper": ", ".join(filter(None, cited)) or config.origin_url or "",
        "weights": f"hf-hub:{config.hf_hub_id}" if config.hf_hub_id else config.url or "",
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what imports print must not reach the answer
        catalogue = _catalogue()
    json.dump(catalogue, sys.stdout)
