"""Call a plugin's hooks and check what they give.

What is wrong is a SpecError in one line, for the author of the plugin or, where only another
version would help, for its user.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType

import pluggy

import zoo
from zoo import hookspecs
from zoo.errors import SpecError
from zoo.names import canonical_namespace, suggest
from zoo.specs import AnySpec, BackboneSpec, Catalog, DatasetSpec, FusionSpec, TransferSpec

HOOKS: Mapping[str, type[AnySpec]] = MappingProxyType({
    "zoo_backbones": BackboneSpec,
    "zoo_fusions": FusionSpec,
    "zoo_transfers": TransferSpec,
    "zoo_datasets": DatasetSpec,
})
CATALOG_HOOK = "zoo_catalog"
_ALL = (*HOOKS, CATALOG_HOOK)


@dataclass(frozen=True)
class Collected:
    """What a plugin's hooks gave: specs by local name, the name behind each alias, a catalogue."""

    hooks: tuple[str, ...]
    specs: Mapping[str, AnySpec]
    aliases: Mapping[str, str]
    catalog: Catalog | None


def collect(target: object, namespace: str) -> Collected:
    """Call the hooks of a module or an object. Raises SpecError, or whatever a hook raises."""
    # A manager per namespace: one plugin's broken hooks can leave no trace in another's.
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    _want_known_arguments(target)
    manager.register(target, name=namespace)
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
            _add(_local(spec, namespace), specs, aliases)
    return Collected(hooks, MappingProxyType(specs), MappingProxyType(aliases), catalog)


def _want_known_arguments(target: object) -> None:
    """A hook may take fewer arguments than it is given, and no others."""
    for hook in _ALL:
        function = getattr(target, hook, None)
        if not callable(function):
            continue
        given = inspect.signature(getattr(hookspecs, hook)).parameters
        for name, parameter in inspect.signature(function).parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and name not in given:
                raise SpecError(
                    f"{hook}() takes {name!r}, which fusion-zoo {zoo.__version__} does not give; "
                    "take it out, or, if a newer version gives it: pip install -U fusion-zoo")


def _hooks(manager: pluggy.PluginManager, target: object) -> tuple[str, ...]:
    """The names of the hooks that the plugin implements; an error for what looks like one and
    is none."""
    callers = manager.get_hookcallers(target) or []
    for caller in callers:
        if not caller.has_spec() and not all(i.optionalhook for i in caller.get_hookimpls()):
            raise SpecError(_unknown_hook(caller.name))
    hooks = tuple(sorted(caller.name for caller in callers if caller.has_spec()))
    for hook in _ALL:
        if hook not in hooks and hasattr(target, hook):
            raise SpecError(f"{hook}() is not marked with @zoo.hookimpl")
    if not hooks:
        name = target.__name__ if isinstance(target, ModuleType) else repr(target)
        raise SpecError(f"{name} implements no hook; there are {', '.join(_ALL)}")
    return hooks


def _unknown_hook(name: str) -> str:
    """A typo is the author's; a hook of a newer version is a matter of versions."""
    near = suggest(name.removeprefix("zoo_"), (hook.removeprefix("zoo_") for hook in _ALL), n=1,
                   cutoff=0.8)
    if near:
        return f"unknown hook {name!r}; did you mean 'zoo_{near[0]}'?"
    return (f"fusion-zoo {zoo.__version__} has no hook {name!r}, it has {', '.join(_ALL)}; if a "
            "newer version has it: pip install -U fusion-zoo; its author can mark it "
            "@zoo.hookimpl(optionalhook=True), and older versions leave it alone")


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
