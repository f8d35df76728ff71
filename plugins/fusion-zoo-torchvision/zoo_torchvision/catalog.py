"""Every classifier and every entry of its weights enum, known without importing torchvision.

torchvision itself is asked once per version, in a process of its own, and its answer is cached.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
import sys
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import zoo
from zoo.cache import ask_once

_BUILD = "zoo_torchvision.build:build"
_FORMAT = 1
_SPDX = {"https://github.com/facebookresearch/SWAG/blob/main/LICENSE": "CC-BY-NC-4.0"}
_CITED = re.compile(r"`([^`]+?)\s*<https?://arxiv\.org/(?:abs|pdf)/([\d.]*\d)[^>]*>`")


class TorchvisionCatalog:
    """`find` and `search` by torchvision's own names: `resnet50`, `resnet50.IMAGENET1K_V2`."""

    def find(self, name: str) -> zoo.BackboneSpec | None:
        """The spec of an architecture's weights under their full name; an architecture alone means
        its DEFAULT weights."""
        full = self._answer["defaults"].get(name, name)
        entry = self._answer["models"].get(full)
        if entry is None:
            return None
        return zoo.BackboneSpec(name=full, build=_BUILD, loads_since="0.1.0", **entry)

    def search(self, pattern: str) -> list[str]:
        """Architectures and names with an entry; an architecture's pattern also means every entry
        of it."""
        names = sorted({*self._answer["models"], *self._answer["defaults"]})
        found = set(fnmatch.filter(names, pattern))
        if "." not in pattern:
            found.update(fnmatch.filter(names, f"{pattern}.*"))
        return [name for name in names if name in found]

    @cached_property
    def _answer(self) -> Mapping[str, Any]:
        return ask_once("torchvision", "zoo_torchvision.catalog", _FORMAT)


def _catalogue() -> dict[str, Any]:
    """`models`: full name → fields of its spec; `defaults`: architecture → full name."""
    from torchvision import models

    entries: dict[str, Any] = {}
    defaults = {}
    for architecture in models.list_models(module=models):  # not detection, video, …
        paper = _paper(models.get_model_builder(architecture).__doc__ or "")
        weights = models.get_model_weights(architecture)
        if not len(weights):
            entries[architecture] = {"paper": paper}
            continue
        defaults[architecture] = f"{architecture}.{weights.DEFAULT.name}"
        for each in weights:
            entries[f"{architecture}.{each.name}"] = {"paper": paper, **_entry(each)}
    return {"format": _FORMAT, "models": entries, "defaults": defaults}


def _entry(weights: Any) -> dict[str, Any]:
    """The fields of the spec of one entry of a weights enum."""
    meta = weights.meta
    side = weights.transforms().crop_size[0]
    accuracy = meta.get("_metrics", {}).get("ImageNet-1K", {}).get("acc@1")
    measured = f"{accuracy:.1f} % on ImageNet-1k" if meta["categories"] else "no classifier"
    licence = meta.get("license", "")
    return {
        "input_size": (3, side, side),
        "summary": f"{meta['num_params'] / 1e6:.1f} M parameters, {measured}, {side} × {side} "
                   "pixels",
        "license": _SPDX.get(licence, licence),
        "weights": weights.url,
    }


def _paper(doc: str) -> str:
    """The first paper that a builder's docstring links to."""
    cited = _CITED.search(doc)
    return f"{' '.join(cited[1].split())}, arXiv:{cited[2]}" if cited else ""


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what imports print must not reach the answer
        catalogue = _catalogue()
    json.dump(catalogue, sys.stdout)
