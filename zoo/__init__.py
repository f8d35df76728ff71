"""Pretrained image models and ways of fusing them, by name.

>>> import zoo
>>> zoo.list_fusions("zoo/m*", kind="outputs")
['zoo/max', 'zoo/mean']
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from zoo.assembly import backbone, fuse, plan
    from zoo.datasets import load_data
    from zoo.deployment import export
    from zoo.discovery import Plugin
    from zoo.errors import ZooError
    from zoo.evaluation import evaluate
    from zoo.hookspecs import hookimpl
    from zoo.hub import pull, push
    from zoo.inference import speed_up
    from zoo.merge_files import merge
    from zoo.model import Model
    from zoo.pipeline import run
    from zoo.registry import (
        info,
        list_backbones,
        list_datasets,
        list_fusions,
        list_transfers,
        plugins,
    )
    from zoo.reproducing import reproduce
    from zoo.specs import BackboneSpec, Catalog, DatasetSpec, FusionSpec, TransferSpec
    from zoo.store import load, save
    from zoo.training import transfer

# Where each public name lives. It is imported when it is first asked for, so that `import zoo`
# stays cheap and the command line can answer without torch.
_HOME = {
    "list_backbones": "zoo.registry",
    "list_fusions": "zoo.registry",
    "list_transfers": "zoo.registry",
    "list_datasets": "zoo.registry",
    "info": "zoo.registry",
    "plugins": "zoo.registry",
    "backbone": "zoo.assembly",
    "fuse": "zoo.assembly",
    "plan": "zoo.assembly",
    "merge": "zoo.merge_files",
    "transfer": "zoo.training",
    "evaluate": "zoo.evaluation",
    "speed_up": "zoo.inference",
    "run": "zoo.pipeline",
    "export": "zoo.deployment",
    "save": "zoo.store",
    "load": "zoo.store",
    "push": "zoo.hub",
    "pull": "zoo.hub",
    "reproduce": "zoo.reproducing",
    "load_data": "zoo.datasets",
    "Model": "zoo.model",
    "Plugin": "zoo.discovery",
    "ZooError": "zoo.errors",
    "hookimpl": "zoo.hookspecs",
    "BackboneSpec": "zoo.specs",
    "FusionSpec": "zoo.specs",
    "TransferSpec": "zoo.specs",
    "DatasetSpec": "zoo.specs",
    "Catalog": "zoo.specs",
}

__all__ = [
    "BackboneSpec",
    "Catalog",
    "DatasetSpec",
    "FusionSpec",
    "Model",
    "Plugin",
    "TransferSpec",
    "ZooError",
    "__version__",
    "backbone",
    "evaluate",
    "export",
    "fuse",
    "hookimpl",
    "info",
    "list_backbones",
    "list_datasets",
    "list_fusions",
    "list_transfers",
    "load",
    "load_data",
    "merge",
    "plan",
    "plugins",
    "pull",
    "push",
    "reproduce",
    "run",
    "save",
    "speed_up",
    "transfer",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
