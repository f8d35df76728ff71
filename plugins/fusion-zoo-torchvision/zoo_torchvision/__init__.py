"""The namespace `torchvision`: its image classifiers and their published weights."""

from __future__ import annotations

import zoo
from zoo_torchvision.catalog import TorchvisionCatalog


@zoo.hookimpl
def zoo_catalog() -> zoo.Catalog:
    return TorchvisionCatalog()
