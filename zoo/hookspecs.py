"""The hooks. A plugin implements those it needs, each marked with `@zoo.hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from zoo.specs import BackboneSpec, Catalog, DatasetSpec, FusionSpec, TransferSpec

PROJECT = "zoo"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def zoo_backbones() -> Iterable[BackboneSpec]:
    """The networks of this namespace."""
    raise NotImplementedError


@hookspec
def zoo_fusions() -> Iterable[FusionSpec]:
    """The fusion strategies of this namespace."""
    raise NotImplementedError


@hookspec
def zoo_transfers() -> Iterable[TransferSpec]:
    """The transfer methods of this namespace."""
    raise NotImplementedError


@hookspec
def zoo_datasets() -> Iterable[DatasetSpec]:
    """The data sets of this namespace."""
    raise NotImplementedError


@hookspec
def zoo_catalog() -> Catalog:
    """A catalogue that finds and searches specs, for namespaces too large to list."""
    raise NotImplementedError
