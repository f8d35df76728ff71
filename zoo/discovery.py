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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType, ModuleType

import pluggy

from zoo import hookspecs
from zoo.errors import BadName, PluginError, SpecError
from zoo.names import canonical_namespace, suggest
from zoo.specs import AnySpec, BackboneSpec, Catalog, DatasetSpec, FusionSpec, TransferSpec

GROUP = "zoo.plugins"
CORE = MappingProxyType({"zoo": "zoo.builtin", "timm": "zoo.backbones.timm_catalog"})
RESERVED = MappingProxyType({
    **dict.fromkeys(CORE, "fusion-zoo"),
    **{name: f"fusion-zoo-{name}" for name in ("lite", "keras", "torchvision", "example")},
})
HOOKS: Mapping[str, type[AnySpec]] = MappingProxyType({
    "zoo_backbones": BackboneSpec,
    "zoo_fusions": FusionSpec,
    "zoo_transfers": TransferSpec,
    "zoo_datasets": DatasetSpec,
})
CATALOG_HOOK = "zoo_catalog"


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
    """What a namespace brings: its specs by local name, the name behind each alias, and its
    catalogue."""

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
        claims: dict[str, list[Plugin]] = {}
        for plugin in self._installed:
            claims.setdefault(plugin.namespace, []).append(plugin)
        others = {namespace: _allowed(_sole(claims[namespace]))
                  for namespace in sorted(claims) if namespace not in CORE}
        return MappingProxyType({**self.core, **others})

    @cached_property
    def _installed(self) -> tuple[Plugin, ...]:
        return tuple(map(_unless_reserved, _installed()))

    def get(self, namespace: str) -> Plugin | None:
        """The plugin that owns this namespace, without a scan for the core's own."""
        return self.core.get(namespace) or self.found.get(namespace)

    def load(self, namespace: str) -> Loaded:
        """Import the plugin and collect its specs, once. Raises PluginError with the reason."""
        if namespace in self._failed:
            raise self._failed[namespace].with_traceback(None)
        if namespace not in self._loaded:
            plugin = self.get(namespace)
            if plugin is None:
                raise PluginError(namespace, None, "no installed distribution owns this namespace")
            try:
                if plugin.error:
                    raise PluginError(namespace, _source(plugin), plugin.error)
                with contained(plugin):
                    self._loaded[namespace] = _load(plugin)
            except PluginError as error:
                self._failed[namespace] = error
                raise
        return self._loaded[namespace]

    def all(self) -> tuple[Plugin, ...]:
        """Every plugin, loaded: its hooks, or its error. Those that claim a namespace which they
        may not have come last."""
        states = []
        for namespace, plugin in self.found.items():
            try:
                states.append(self.load(namespace).plugin)
            except PluginError as error:
                states.append(replace(plugin, error=error.reason))
        refused = [plugin for plugin in self._installed if plugin.error
                   and self.found[plugin.namespace].distribution != plugin.distribution]
        return (*states, *refused)

    @property
    def failed(self) -> Mapping[str, PluginError]:
        """The namespaces that were asked for and could not be loaded."""
        return MappingProxyType(self._failed)


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


@contextmanager
def contained(plugin: Plugin, doing: str = "") -> Iterator[None]:
    """Turn whatever a plugin's own code raises into a PluginError that says why; ZOO_STRICT=1 lets
    it through."""
    try:
        yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        if os.environ.get("ZOO_STRICT") == "1":
            raise
        reason = f"{doing}: {_reason(error)}" if doing else _reason(error)
        raise PluginError(plugin.namespace, _source(plugin), reason) from error


def _installed() -> Iterator[Plugin]:
    """Third parties' entry points. A distribution that is seen twice counts once: the first on
    the path is the one that is imported."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or GROUP not in text:
            continue
        name = _normalised(distribution.metadata["Name"] or "")
        if name not in seen:
            seen.add(name)
            yield from _claims(distribution, name)


def _claims(distribution: importlib.metadata.Distribution, name: str) -> Iterator[Plugin]:
    """The namespaces that one distribution claims."""
    source = Plugin(namespace=name, module="", distribution=name,
                    version=distribution.version or "", editable=_is_editable(distribution))
    try:
        entries = list(distribution.entry_points.select(group=GROUP))
    except Exception as error:  # the parser of the standard library raises whatever it meets
        yield replace(source, error=f"its entry_points.txt cannot be read: {_reason(error)}")
        return
    for entry in entries:
        plugin = replace(source, namespace=entry.name, module=entry.value)
        try:
            yield replace(plugin, namespace=canonical_namespace(entry.name))
        except BadName as error:
            yield replace(plugin, error=str(error))


def _unless_reserved(plugin: Plugin) -> Plugin:
    owner = RESERVED.get(plugin.namespace, plugin.distribution)
    if plugin.distribution == owner:
        return plugin
    return replace(plugin, error=f"the namespace is reserved for {owner}")


def _sole(claims: Sequence[Plugin]) -> Plugin:
    """The one plugin that may have a namespace; with an error when there are several."""
    first, *others = [plugin for plugin in claims if not plugin.error] or claims
    if not others:
        return first
    if all(plugin.distribution == first.distribution for plugin in others):
        return replace(first, error=f"{_source(first)} claims it {len(others) + 1} times")
    count = {1: "two"}.get(len(others), str(len(others) + 1))
    return replace(first, error=f"{count} distributions claim it, "
                   f"{', '.join(map(_source, (first, *others)))}; uninstall all but one")


def _allowed(plugin: Plugin) -> Plugin:
    """The plugin, with an error when ZOO_PLUGINS does not name it."""
    allowed = os.environ.get("ZOO_PLUGINS")
    if allowed is None:
        return plugin
    names = {name.strip().replace("_", "-") for name in allowed.split(",")}
    if plugin.namespace in names:
        return plugin
    return replace(plugin, error=f"ZOO_PLUGINS={allowed} does not allow it")


def _load(plugin: Plugin) -> Loaded:
    entry = importlib.metadata.EntryPoint(plugin.namespace, plugin.module, GROUP)
    target: object = entry.load()
    # A manager per namespace: one plugin's broken hooks can leave no trace in another's.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(target, name=plugin.namespace)
    hooks = _hooks(manager, target)
    specs: dict[str, AnySpec] = {}
    aliases: dict[str, str] = {}
    catalog: Catalog | None = None
    for hook in hooks:
        results = getattr(manager.hook, hook)()
        result = results[0] if results else None  # pluggy leaves None out
        if hook == CATALOG_HOOK:
            catalog = _catalog(result)
            continue
        for spec in _specs(result, hook, HOOKS[hook]):
            _add(_local(spec, plugin.namespace), specs, aliases)
    return Loaded(replace(plugin, hooks=hooks), MappingProxyType(specs),
                  MappingProxyType(aliases), catalog)


def _hooks(manager: pluggy.PluginManager, target: object) -> tuple[str, ...]:
    """The names of the hooks that the plugin implements; an error for what looks like one and
    is none."""
    known = (*HOOKS, CATALOG_HOOK)
    callers = manager.get_hookcallers(target) or []
    for caller in callers:
        if not caller.has_spec() and not all(i.optionalhook for i in caller.get_hookimpls()):
            near = suggest(caller.name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise SpecError(f"unknown hook {caller.name!r}; {hint}")
    hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
    for hook in known:
        if hook not in hooks and hasattr(target, hook):
            raise SpecError(f"{hook}() is not marked with @zoo.hookimpl")
    if not hooks:
        name = target.__name__ if isinstance(target, ModuleType) else repr(target)
        raise SpecError(f"{name} implements no hook; there are {', '.join(known)}")
    return hooks


def _catalog(result: object) -> Catalog:
    if not isinstance(result, Catalog):
        raise SpecError(f"{CATALOG_HOOK}() returned {type(result).__name__}, "
                        "expected an object with find(name) and search(pattern)")
    return result


def _specs(result: object, hook: str, kind: type[AnySpec]) -> Iterator[AnySpec]:
    if isinstance(result, (str, bytes)) or not isinstance(result, Iterable):
        raise SpecError(f"{hook}() returned {type(result).__name__}, "
                        f"expected an iterable of {kind.__name__}")
    for spec in result:
        if not isinstance(spec, kind):
            raise SpecError(f"{hook}() gave {spec!r}, expected a {kind.__name__}")
        yield spec


def _local(spec: AnySpec, namespace: str) -> AnySpec:
    """The spec under its names inside the namespace; `acme/gated` is taken for `gated`."""
    return replace(spec, name=_inside(spec.name, namespace),
                   aliases=tuple(_inside(alias, namespace) for alias in spec.aliases))


def _inside(name: str, namespace: str) -> str:
    prefix, slash, local = name.rpartition("/")
    if slash and canonical_namespace(prefix) != namespace:
        raise SpecError(f"the spec {name!r} is not in the namespace {namespace!r}")
    return local


def _add(spec: AnySpec, specs: dict[str, AnySpec], aliases: dict[str, str]) -> None:
    names = (spec.name, *spec.aliases)
    for number, name in enumerate(names):
        if name in specs or name in aliases or name in names[:number]:
            raise SpecError(f"the name {name!r} is given twice; names are unique across kinds")
    specs[spec.name] = spec
    aliases.update(dict.fromkeys(spec.aliases, spec.name))


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
    return f"{plugin.distribution} {plugin.version}".strip()


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, SpecError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
