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
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import zoo
from zoo.collecting import collect
from zoo.errors import BadName, PluginError, SpecError
from zoo.known import known_plugins
from zoo.names import canonical_namespace
from zoo.specs import AnySpec, Catalog

GROUP = "zoo.plugins"
CORE = MappingProxyType({"zoo": "zoo.builtin", "timm": "zoo.backbones.timm_catalog"})
RESERVED = MappingProxyType({
    **dict.fromkeys(CORE, "fusion-zoo"),
    **{namespace: known.distribution for namespace, known in known_plugins().items()
       if known.reserved},
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

    @property
    def source(self) -> str:
        """`fusion-zoo-acme 1.0`."""
        return f"{self.distribution} {self.version}".strip()


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
        self._noted: dict[str, PluginError] = {}

    @cached_property
    def core(self) -> Mapping[str, Plugin]:
        version = zoo.__version__
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
                    raise PluginError(namespace, plugin.source, plugin.error)
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

    def note(self, error: PluginError) -> None:
        """Keep what went wrong in a namespace that is loaded, for whoever asks why names lack."""
        self._noted[error.namespace] = error

    @property
    def failed(self) -> Mapping[str, PluginError]:
        """The namespaces that were asked for and gave no names, or not all of them."""
        return MappingProxyType({**self._noted, **self._failed})


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
    it through. What it prints goes to stderr: stdout is what a program reads."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # an interruption is the user's, and goes on
        if os.environ.get("ZOO_STRICT") == "1":
            raise
        reason = f"{doing}: {_reason(error)}" if doing else _reason(error)
        raise PluginError(plugin.namespace, plugin.source, reason) from error


def _installed() -> Iterator[Plugin]:
    """Third parties' entry points. A distribution that is seen twice counts once: the first on
    the path is the one that is imported."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        try:
            text = distribution.read_text("entry_points.txt")
        except (OSError, UnicodeDecodeError):
            continue  # nobody knows whether it is a plugin
        if not text or GROUP not in text:
            continue
        source = _described(distribution)
        if source.distribution not in seen:
            seen.update(filter(None, (source.distribution,)))
            yield from _claims(distribution, source)


def _described(distribution: importlib.metadata.Distribution) -> Plugin:
    """A distribution that has plugins, under its own name instead of a namespace."""
    try:
        metadata = distribution.metadata
        name, version = _normalised(metadata["Name"] or ""), metadata["Version"] or ""
        editable = _is_editable(distribution)
    except Exception as error:  # the parsers of the standard library raise whatever they meet
        return Plugin(namespace="", module="", distribution="", version="",
                      error=f"its metadata cannot be read: {_reason(error)}")
    return Plugin(namespace=name, module="", distribution=name, version=version, editable=editable)


def _claims(distribution: importlib.metadata.Distribution, source: Plugin) -> Iterator[Plugin]:
    """The namespaces that one distribution claims."""
    try:
        entries = list(distribution.entry_points.select(group=GROUP))
    except Exception as error:
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
        return replace(first, error=f"{first.source} claims it {len(others) + 1} times")
    count = {1: "two"}.get(len(others), str(len(others) + 1))
    sources = ", ".join(plugin.source for plugin in (first, *others))
    return replace(first, error=f"{count} distributions claim it, {sources}; uninstall all but one")


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
    found = collect(entry.load(), plugin.namespace)
    return Loaded(replace(plugin, hooks=found.hooks), found.specs, found.aliases, found.catalog)


def _is_editable(distribution: importlib.metadata.Distribution) -> bool:
    try:
        text = distribution.read_text("direct_url.json") or "{}"
        return bool(json.loads(text).get("dir_info", {}).get("editable", False))
    except (ValueError, AttributeError):
        return False


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception of a plugin's own class
        text = ""
    if isinstance(error, SpecError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
