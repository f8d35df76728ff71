"""From names to specs: look up, list, suggest.

A look-up loads one namespace. A listing reads the names it has cached for that distribution
and version, and loads only what it has not.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import zoo
from zoo.cache import cache_folder, read_json, write_json
from zoo.discovery import Loaded, Plugin, contained, discovery
from zoo.errors import BadName, PluginError, UnknownName
from zoo.known import known_plugins
from zoo.names import Name, natural, parse, suggest
from zoo.specs import KINDS, AnySpec, BackboneSpec, DatasetSpec, FusionSpec, Spec, TransferSpec

S = TypeVar("S", bound=AnySpec)

_TYPES: tuple[type[AnySpec], ...] = (BackboneSpec, FusionSpec, TransferSpec, DatasetSpec)
_ANY = "backbone, fusion, transfer or dataset"


@dataclass(frozen=True, slots=True)
class Listed:
    """One row of a listing: `type` is backbone, fusion, transfer or dataset."""

    name: str
    type: str
    kind: str
    summary: str


def find(given: str, kind: type[S]) -> S:
    """The spec of this kind with this name, under its full name (`zoo/ties`).

    Raises UnknownName with the nearest spellings, BadName, or PluginError when the namespace
    is installed but broken.
    """
    spec = _find(given, kind.kind_name)
    if not isinstance(spec, kind):
        raise UnknownName(given, kind.kind_name, hint=f"{spec.name} is a {spec.kind_name}")
    return spec


def info(name: str) -> AnySpec:
    """The spec of whatever has this name, under its full name.

    >>> info("ties").name
    'zoo/ties'

    Raises UnknownName with the nearest spellings.
    """
    return _find(name, _ANY)


def load(spec: Spec) -> Callable[..., Any]:
    """Import what `spec.build` names. Raises PluginError when that fails."""
    return resolve(spec.build, spec.name)


def resolve(target: str, owner: str) -> Callable[..., Any]:
    """Import `"module:attribute"` for the registered name `owner`."""
    module, _, attribute = target.partition(":")
    with contained(_owner(owner), f"{owner} is built by {target!r}"):
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    return cast(Callable[..., Any], found)


def _owner(name: str) -> Plugin:
    namespace = name.partition("/")[0]
    return discovery().get(namespace) or Plugin(
        namespace=namespace, module="", distribution="", version="")


def list_backbones(pattern: str = "*") -> list[str]:
    """Full names of the networks that match a shell-style pattern, `timm/resnet*`."""
    return [row.name for row in listing(pattern) if row.type == "backbone"]


def list_fusions(pattern: str = "*", *, kind: str | None = None) -> list[str]:
    """Full names of the fusion strategies; `kind` is weights, features, outputs or choice."""
    if kind not in (None, *KINDS):
        raise UnknownName(str(kind), "kind of fusion", KINDS)
    return [row.name for row in listing(pattern)
            if row.type == "fusion" and kind in (None, row.kind)]


def list_transfers(pattern: str = "*") -> list[str]:
    """Full names of the transfer methods."""
    return [row.name for row in listing(pattern) if row.type == "transfer"]


def list_datasets(pattern: str = "*") -> list[str]:
    """Full names of the registered data sets."""
    return [row.name for row in listing(pattern) if row.type == "dataset"]


def plugins() -> tuple[Plugin, ...]:
    """Every installed plugin: namespace, distribution, version, hooks, error. Loads them all."""
    return discovery().all()


def listing(pattern: str = "*") -> list[Listed]:
    """Everything whose name matches, in natural order within each namespace.

    A pattern with a slash matches full names; one without matches the part after the slash in
    every namespace. Namespaces that cannot be loaded are left out; `plugins()` says why.
    """
    prefix, slash, local = pattern.rpartition("/")
    if slash and _is_literal(prefix):
        namespaces = [prefix.replace("_", "-")]
    else:
        namespaces = [namespace for namespace in discovery().found
                      if not slash or fnmatch.fnmatchcase(namespace, prefix)]
    return [row for namespace in namespaces for row in _rows(namespace, local)]


def _rows(namespace: str, pattern: str) -> list[Listed]:
    plugin = discovery().get(namespace)
    if plugin is None:
        return []
    rows = _remembered(plugin)
    if rows is None:
        try:
            rows = _fresh_rows(plugin, pattern)
        except PluginError as error:
            discovery().note(error)
            return []
    return sorted((row for row in rows
                   if _matches(row.name.partition("/")[2], pattern, row.type)),
                  key=lambda row: natural(row.name))


def _matches(local: str, pattern: str, type_: str) -> bool:
    """`resnet18` alone also means each of its pretrained tags, as in timm."""
    return fnmatch.fnmatchcase(local, pattern) or (
        type_ == "backbone" and "." in local and "." not in pattern
        and fnmatch.fnmatchcase(local.partition(".")[0], pattern))


def _fresh_rows(plugin: Plugin, pattern: str) -> list[Listed]:
    loaded = discovery().load(plugin.namespace)
    rows = [_row(plugin.namespace, spec) for spec in loaded.specs.values()]
    if loaded.catalog is None:
        _remember(plugin, rows)
        return rows
    with contained(loaded.plugin, f"its catalogue cannot search for {pattern!r}"):
        names = [str(name) for name in loaded.catalog.search(pattern)]
    return rows + [Listed(f"{plugin.namespace}/{name}", "backbone", "", "") for name in names]


def _row(namespace: str, spec: AnySpec) -> Listed:
    kind = spec.kind if isinstance(spec, FusionSpec) else (
        spec.family if isinstance(spec, TransferSpec) else "")
    return Listed(f"{namespace}/{spec.name}", spec.kind_name, kind, spec.summary)


def _find(given: str, kind: str) -> AnySpec:
    try:
        name = parse(given)
    except BadName as error:
        raise UnknownName(given, kind, hint=error.problem) from None
    if not isinstance(name, Name):
        raise UnknownName(str(given), kind, hint="a path or an address is no registered name")
    for namespace in _searched(name):
        spec = _in(discovery().load(namespace), name.local)
        if spec is not None:
            return replace(spec, name=f"{namespace}/{spec.name}")
    raise _unknown(given, name, kind)


def _searched(name: Name) -> list[str]:
    """The namespaces in which a name is looked for: its own; for a bare one the core's."""
    if name.namespace is None:
        return list(discovery().core)
    return [name.namespace] if discovery().get(name.namespace) else []


def _in(loaded: Loaded, local: str) -> AnySpec | None:
    spec = loaded.specs.get(loaded.aliases.get(local, local))
    if spec is None and loaded.catalog is not None:
        with contained(loaded.plugin, f"its catalogue cannot find {local!r}"):
            spec = loaded.catalog.find(local)
            if spec is not None and not isinstance(spec, _TYPES):
                raise TypeError(f"it gave {type(spec).__name__}, expected a spec")
    if spec is not None and local in spec.aliases:
        namespace = loaded.plugin.namespace
        warnings.warn(f"{namespace}/{local} is now called {namespace}/{spec.name}",
                      DeprecationWarning, stacklevel=_level_of_caller())
    return spec


def _level_of_caller() -> int:
    """The stacklevel, for the function that asks, of the first line outside of zoo."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "zoo":
        frame = frame.f_back
        level += 1
    return level


def _unknown(given: str, name: Name, kind: str) -> UnknownName:
    """With near names: of this kind, in this namespace or, for a bare name, in the core; with the
    near namespaces when nobody owns this one."""
    elsewhere = (f"for a Hub repository write 'hf-hub:{given}', for a path './{given}'"
                 if name.namespace and kind in (_ANY, BackboneSpec.kind_name) else "")
    namespaces = _searched(name)
    if not namespaces:
        near, hint = _nobodys(name.namespace or "")
        return UnknownName(given, kind, [f"{namespace}/{name.local}" for namespace in near],
                           _joined(hint, "" if name.namespace in known_plugins() else elsewhere))
    rows = [row for namespace in namespaces for row in _rows(namespace, "*")]
    full = {row.name.partition("/")[2]: row.name for row in reversed(rows)
            if kind in (_ANY, row.type)}
    near = [full[local] if name.namespace else local for local in suggest(name.local, full)]
    listed = (f"see `zoo ls '{name.namespace}/*'`" if name.namespace else
              f"see `zoo ls`, or write './{given}' for a path")
    return UnknownName(given, kind, near, _joined("" if near else listed, elsewhere))


def _nobodys(namespace: str) -> tuple[list[str], str]:
    """Of a namespace that no installed plugin owns: the near ones, and what to install."""
    found, known = discovery().found, known_plugins()
    if namespace in known:
        return [], _absent(namespace)
    near = suggest(namespace, {**found, **known})
    absent = [_absent(each) for each in near if each not in found]
    return near, _joined(f"no installed plugin owns the namespace {namespace!r}", *absent)


def _absent(namespace: str) -> str:
    plugin = known_plugins()[namespace]
    return (f"the namespace {namespace!r} is {plugin.distribution}'s, which is not installed: "
            f"{plugin.install}")


def _joined(*hints: str) -> str:
    return "; ".join(filter(None, hints))


def _remembered(plugin: Plugin) -> list[Listed] | None:
    """The rows of a namespace as its distribution in this version listed them before."""
    kept = read_json(_rows_file(plugin)) if _may_remember(plugin) else None
    if kept is None or kept.get("key") != _key(plugin):
        return None
    try:
        return [Listed(*row) for row in kept["rows"]]
    except (KeyError, TypeError):
        return None


def _remember(plugin: Plugin, rows: Sequence[Listed]) -> None:
    if _may_remember(plugin):
        write_json(_rows_file(plugin), {"key": _key(plugin), "rows": [*map(astuple, rows)]})


def _rows_file(plugin: Plugin) -> Path:
    return cache_folder() / "names" / f"{plugin.namespace}.json"


def _key(plugin: Plugin) -> list[str]:
    return [plugin.distribution, plugin.version, plugin.module, zoo.__version__]


def _may_remember(plugin: Plugin) -> bool:
    """The core's own names are cheaper to ask for than to keep, and an editable install changes
    without a new version."""
    return plugin.distribution != "fusion-zoo" and not plugin.editable and not plugin.error


def _is_literal(text: str) -> bool:
    return not any(character in text for character in "*?[")
