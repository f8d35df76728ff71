"""From names to specs: look up, list, suggest.

A look-up loads one namespace. A listing reads the names it has cached for that distribution
and version, and loads only what it has not.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from zoo.cache import cache_folder, read_json, write_json
from zoo.discovery import Loaded, Plugin, discovery
from zoo.errors import BadName, PluginError, UnknownName
from zoo.names import Name, parse, suggest
from zoo.specs import (
    AnySpec,
    BackboneSpec,
    DatasetSpec,
    FusionSpec,
    Spec,
    TransferSpec,
)

S = TypeVar("S", bound=AnySpec)

_TYPES: tuple[type[AnySpec], ...] = (BackboneSpec, FusionSpec, TransferSpec, DatasetSpec)


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
    return _find(name, "thing")


def load(spec: Spec) -> Callable[..., Any]:
    """Import what `spec.build` names. Raises PluginError when it is not there."""
    return resolve(spec.build, spec.name)


def resolve(target: str, owner: str) -> Callable[..., Any]:
    """Import `"module:attribute"` for the registered name `owner`."""
    module, _, attribute = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise PluginError(owner, None, f"{target}: {error}") from error
    return cast(Callable[..., Any], found)


def list_backbones(pattern: str = "*") -> list[str]:
    """Full names of the networks that match a shell-style pattern, `timm/resnet*`."""
    return [row.name for row in listing(pattern) if row.type == "backbone"]


def list_fusions(pattern: str = "*", *, kind: str | None = None) -> list[str]:
    """Full names of the fusion strategies; `kind` is weights, features or outputs."""
    if kind is not None and kind not in ("weights", "features", "outputs"):
        raise UnknownName(kind, "kind of fusion", ("weights", "features", "outputs"))
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
    namespaces = [prefix.replace("_", "-")] if _is_literal(prefix) and slash else [
        namespace for namespace in discovery().found
        if not slash or fnmatch.fnmatchcase(namespace, prefix)
    ]
    rows: list[Listed] = []
    for namespace in namespaces:
        rows.extend(_rows(namespace, local))
    return rows


def _rows(namespace: str, pattern: str) -> list[Listed]:
    plugin = discovery().get(namespace)
    if plugin is None:
        return []
    rows = _cached_rows(plugin)
    if rows is None:
        try:
            rows = _fresh_rows(plugin, pattern)
        except PluginError:
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
        _NamesCache().put(plugin, rows)
        return rows
    names = loaded.catalog.search(pattern)
    return rows + [Listed(f"{plugin.namespace}/{name}", "backbone", "", "") for name in names]


def _row(namespace: str, spec: AnySpec) -> Listed:
    kind = spec.kind if isinstance(spec, FusionSpec) else (
        spec.family if isinstance(spec, TransferSpec) else "")
    return Listed(f"{namespace}/{spec.name}", spec.kind_name, kind, spec.summary)


def _cached_rows(plugin: Plugin) -> list[Listed] | None:
    return _NamesCache().get(plugin) if _is_cached(plugin) else None


def _find(given: str, kind: str) -> AnySpec:
    try:
        name = parse(given)
    except BadName as error:
        if given.count("/") == 1 and ":" not in given:
            raise UnknownName(given, kind, hint=f"for a Hub repository write 'hf-hub:{given}', "
                              f"for a path './{given}'") from None
        raise UnknownName(given, kind, hint=error.problem) from None
    if not isinstance(name, Name):
        raise UnknownName(given, kind, hint="a path or an address is not a registered name")
    for namespace in [name.namespace] if name.namespace else list(discovery().core):
        if discovery().get(namespace) is None:
            break
        spec = _in(discovery().load(namespace), name.local)
        if spec is not None:
            return replace(spec, name=f"{namespace}/{spec.name}")
    raise _unknown(given, name, kind)


def _in(loaded: Loaded, local: str) -> AnySpec | None:
    if local in loaded.specs:
        return loaded.specs[local]
    if local in loaded.aliases:
        new = loaded.aliases[local]
        namespace = loaded.plugin.namespace
        warnings.warn(f"{namespace}/{local} is now called {namespace}/{new}",
                      DeprecationWarning, stacklevel=5)
        return loaded.specs[new]
    if loaded.catalog is None:
        return None
    spec = loaded.catalog.find(local)
    if spec is not None and not isinstance(spec, _TYPES):
        raise PluginError(loaded.plugin.namespace, loaded.plugin.distribution,
                          f"its catalogue found {type(spec).__name__}, expected a spec")
    return spec


def _unknown(given: str, name: Name, kind: str) -> UnknownName:
    """Near names: of this kind, in this namespace or, for a bare name, in the core; the installed
    namespaces when the namespace itself is unknown."""
    namespaces = [name.namespace] if name.namespace else list(discovery().core)
    if name.namespace and discovery().get(name.namespace) is None:
        near = suggest(name.namespace, discovery().found)
        hint = (f"no installed plugin owns the namespace {name.namespace!r}; "
                f"for a Hub repository write 'hf-hub:{given}'")
        return UnknownName(given, kind, [f"{namespace}/{name.local}" for namespace in near],
                           f", or: {hint}" if near else hint)
    rows = [row for namespace in namespaces for row in _rows(namespace, "*")]
    known = [row.name for row in rows if kind in ("thing", row.type)]
    folded = {known_name.partition("/")[2]: known_name for known_name in known}
    near = [folded[local] if name.namespace else local
            for local in suggest(name.local, folded)]
    return UnknownName(given, kind, near, "" if near else "see `zoo ls`")


class _NamesCache:
    """Names by namespace in one small JSON file, each entry good for one distribution and
    version."""

    def __init__(self) -> None:
        self.path = cache_folder() / "names.json"

    def get(self, plugin: Plugin) -> list[Listed] | None:
        entry = (read_json(self.path) or {}).get(plugin.namespace, {})
        if entry.get("key") != _key(plugin):
            return None
        return [Listed(*row) for row in entry["rows"]]

    def put(self, plugin: Plugin, rows: Iterable[Listed]) -> None:
        if not _is_cached(plugin):
            return
        entries = read_json(self.path) or {}
        entries[plugin.namespace] = {
            "key": _key(plugin),
            "rows": [[row.name, row.type, row.kind, row.summary] for row in rows],
        }
        write_json(self.path, entries)


def _key(plugin: Plugin) -> list[str]:
    return [plugin.distribution, plugin.version, plugin.module]


def _is_cached(plugin: Plugin) -> bool:
    """The core's own names are cheaper to ask for than to cache, and an editable install changes
    without a new version."""
    return plugin.distribution != "fusion-zoo" and not plugin.editable and not plugin.error


def natural(text: str) -> list[tuple[int, int | str]]:
    """A sort key under which `resnet9` comes before `resnet18`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in _parts(text)]


def _parts(text: str) -> Iterator[str]:
    return filter(None, re.split(r"(\d+)", text.lower()))


def _is_literal(text: str) -> bool:
    return not any(character in text for character in "*?[")
