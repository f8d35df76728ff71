"""Find the plugins that are installed, load one namespace at a time, and contain what breaks.

The entry point's name in the group `zoo.plugins` is the namespace. Nothing is imported until
a name of that namespace is asked for; what goes wrong then costs only that namespace its names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType, ModuleType

import pluggy

from zoo import hookspecs
from zoo.errors import BadName, PluginError, SpecError
from zoo.names import canonical_namespace
from zoo.specs import AnySpec, BackboneSpec, Catalog, DatasetSpec, FusionSpec, TransferSpec

GROUP = "zoo.plugins"
CORE = MappingProxyType({"zoo": "zoo.builtin", "timm": "zoo.backbones.timm_catalog"})
RESERVED = MappingProxyType(
    {name: f"fusion-zoo-{name}" for name in ("lite", "keras", "torchvision")}
)
HOOKS: Mapping[str, type[AnySpec]] = MappingProxyType({
    "zoo_backbones": BackboneSpec,
    "zoo_fusions": FusionSpec,
    "zoo_transfers": TransferSpec,
    "zoo_datasets": DatasetSpec,
})


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One namespace as it was found, and, once loaded, what became of it."""

    namespace: str
    module: str
    distribution: str
    version: str
    editable: bool = False
    hooks: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Loaded:
    """What a namespace brings: its specs by local name and by alias, and its catalogues."""

    plugin: Plugin
    specs: Mapping[str, AnySpec]
    aliases: Mapping[str, str]
    catalog: Catalog | None


class Discovery:
    """The namespaces of this environment. `found` reads metadata only; `load` imports one module.

    ZOO_PLUGINS=a,b allows only these namespaces beside the core (ZOO_PLUGINS= none at all);
    ZOO_STRICT=1 lets the plugin's own exception through.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}
        self._failed: dict[str, PluginError] = {}

    @cached_property
    def core(self) -> Mapping[str, Plugin]:
        version = _core_version()
        return MappingProxyType({
            namespace: Plugin(namespace=namespace, module=module, distribution="fusion-zoo",
                              version=version)
            for namespace, module in CORE.items()
        })

    @cached_property
    def found(self) -> Mapping[str, Plugin]:
        """Every namespace, the core's first, the others in alphabetical order."""
        others: dict[str, Plugin] = {}
        for plugin in _installed():
            first = others.get(plugin.namespace)
            others[plugin.namespace] = plugin if first is None else _clash(first, plugin)
        checked = (_checked(others[name]) for name in sorted(others) if name not in CORE)
        return MappingProxyType({**self.core, **{plugin.namespace: plugin for plugin in checked}})

    def get(self, namespace: str) -> Plugin | None:
        """The plugin that owns this namespace, without a scan for the core's own."""
        return self.core.get(namespace) or self.found.get(namespace)

    def load(self, namespace: str) -> Loaded:
        """Import the plugin and collect its specs, once. Raises PluginError with the reason."""
        if namespace in self._loaded:
            return self._loaded[namespace]
        if namespace in self._failed:
            raise self._failed[namespace]
        plugin = self.get(namespace)
        if plugin is None:
            raise PluginError(namespace, None, "no installed distribution owns this namespace")
        try:
            if plugin.error:
                raise SpecError(plugin.error)
            loaded = _load(plugin)
        except (Exception, SystemExit) as error:
            if os.environ.get("ZOO_STRICT") == "1" and not plugin.error:
                raise
            failure = PluginError(namespace, _source(plugin), _reason(error))
            failure.__cause__ = error
            self._failed[namespace] = failure
            raise failure from error
        self._loaded[namespace] = loaded
        return loaded

    def all(self) -> tuple[Plugin, ...]:
        """Every plugin, loaded: its hooks, or its error."""
        states = []
        for namespace, plugin in self.found.items():
            try:
                states.append(self.load(namespace).plugin)
            except PluginError as error:
                states.append(replace(plugin, error=error.reason))
        return tuple(states)


_current: Discovery | None = None


def discovery() -> Discovery:
    """The one Discovery of this process."""
    global _current
    if _current is None:
        _current = Discovery()
    return _current


def reset() -> None:
    """Forget everything found and loaded, as after an installation."""
    global _current
    _current = None
    importlib.invalidate_caches()


def _installed() -> Iterator[Plugin]:
    """Third parties' entry points. A distribution that is seen twice counts once: the first on
    the path is the one that is imported."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or GROUP not in text:
            continue
        name = _normalised(distribution.metadata["Name"] or "")
        if name in seen:
            continue
        seen.add(name)
        for entry in distribution.entry_points.select(group=GROUP):
            plugin = Plugin(
                namespace=entry.name, module=entry.value, distribution=name,
                version=distribution.version, editable=_is_editable(distribution),
            )
            try:
                yield replace(plugin, namespace=canonical_namespace(entry.name))
            except BadName as error:
                yield replace(plugin, error=str(error))


def _checked(plugin: Plugin) -> Plugin:
    """The plugin, with an error when it may not have this namespace here."""
    allowed = os.environ.get("ZOO_PLUGINS")
    if allowed is not None:
        names = {name.strip().replace("_", "-") for name in allowed.split(",")}
        if plugin.namespace not in names:
            return replace(plugin, error=f"ZOO_PLUGINS={allowed} does not allow it")
    owner = RESERVED.get(plugin.namespace)
    if owner and plugin.distribution != owner and not plugin.error:
        return replace(plugin, error=f"the namespace is reserved for {owner}")
    return plugin


def _clash(first: Plugin, second: Plugin) -> Plugin:
    return replace(first, error=(
        f"two distributions claim it, {_source(first)} and {_source(second)}; uninstall one"
    ))


def _load(plugin: Plugin) -> Loaded:
    # A manager per namespace: one plugin's broken hooks can leave no trace in another's.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    module_name, _, attribute = plugin.module.partition(":")
    target: object = importlib.import_module(module_name)
    for part in filter(None, attribute.split(".")):
        target = getattr(target, part)
    manager.register(target, name=plugin.namespace)
    manager.check_pending()
    callers = manager.get_hookcallers(target) or []
    hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
    _want_marked_hooks(target, hooks)
    specs: dict[str, AnySpec] = {}
    aliases: dict[str, str] = {}
    for hook, kind in HOOKS.items():
        for result in getattr(manager.hook, hook)():
            for spec in _specs(result, hook, kind):
                _add(_local(spec, plugin.namespace), specs, aliases)
    catalogs = manager.hook.zoo_catalog()
    if catalogs and not isinstance(catalogs[0], Catalog):
        raise SpecError(f"zoo_catalog() returned {type(catalogs[0]).__name__}, "
                        "expected an object with find(name) and search(pattern)")
    return Loaded(replace(plugin, hooks=hooks), MappingProxyType(specs),
                  MappingProxyType(aliases), catalogs[0] if catalogs else None)


def _specs(result: object, hook: str, kind: type[AnySpec]) -> Iterator[AnySpec]:
    if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
        raise SpecError(f"{hook}() returned {type(result).__name__}, "
                        f"expected an iterable of {kind.__name__}")
    for spec in result:
        if not isinstance(spec, kind):
            raise SpecError(f"{hook}() gave {spec!r}, expected a {kind.__name__}")
        yield spec


def _local(spec: AnySpec, namespace: str) -> AnySpec:
    """The spec under its name inside the namespace; `acme/gated` is taken for `gated`."""
    prefix, slash, local = spec.name.rpartition("/")
    if not slash:
        return spec
    if canonical_namespace(prefix) != namespace:
        raise SpecError(f"the spec {spec.name!r} is not in the namespace {namespace!r}")
    return replace(spec, name=local)


def _add(spec: AnySpec, specs: dict[str, AnySpec], aliases: dict[str, str]) -> None:
    for name in (spec.name, *spec.aliases):
        if name in specs or name in aliases:
            raise SpecError(f"the name {name!r} is given twice; names are unique across kinds")
    specs[spec.name] = spec
    aliases.update(dict.fromkeys(spec.aliases, spec.name))


def _want_marked_hooks(target: object, hooks: tuple[str, ...]) -> None:
    unmarked = [hook for hook in (*HOOKS, "zoo_catalog")
                if hook not in hooks and hasattr(target, hook)]
    if unmarked:
        raise SpecError(f"{unmarked[0]}() is not marked with @zoo.hookimpl")
    if not hooks:
        name = target.__name__ if isinstance(target, ModuleType) else repr(target)
        raise SpecError(f"{name} implements no hook; there are {', '.join(HOOKS)}, zoo_catalog")


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    text = distribution.read_text("direct_url.json")
    if not text:
        return False
    try:
        return bool(json.loads(text).get("dir_info", {}).get("editable", False))
    except (ValueError, AttributeError):
        return False


def _core_version() -> str:
    from zoo import __version__

    return __version__


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _source(plugin: Plugin) -> str:
    return f"{plugin.distribution} {plugin.version}"


def _reason(error: BaseException) -> str:
    if isinstance(error, SpecError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
