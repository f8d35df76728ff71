"""Checks of a plugin as a whole, and of every spec whatever its kind."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from zoo.assembly import backbone, fuse
from zoo.discovery import discovery
from zoo.errors import OptionError
from zoo.options import checked, core_arguments, options_of
from zoo.registry import load, resolve
from zoo.specs import AnySpec, BackboneSpec, FusionSpec, TransferSpec
from zoo.training import transfer

_HEAVY = ("torch", "timm", "torchvision", "tensorflow", "keras", "transformers")
# Names of a catalogue that are looked up.
_SOME = 20
_TAKES_OPTIONS: Mapping[type[AnySpec], Callable[..., Any]] = {
    BackboneSpec: backbone, FusionSpec: fuse, TransferSpec: transfer}
# Positional arguments that each kind of builder has.
_POSITIONAL = {"tensors", "states", "dims", "members", "num_classes", "model", "models",
               "self"}


def loads_alone_and_is_light(namespace: str) -> None:
    """In a fresh process the plugin loads, and brings no heavy package with it."""
    script = (
        "import sys, json\n"
        "from zoo.discovery import discovery\n"
        f"loaded = discovery().load({namespace!r})\n"
        f"print(json.dumps([name for name in {_HEAVY!r} if name in sys.modules]))\n"
    )
    path = os.pathsep.join(filter(None, sys.path))  # the same distributions as in this process
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         check=False, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, f"{namespace} does not load alone: {ran.stderr.strip()[-500:]}"
    heavy = json.loads(ran.stdout.strip().splitlines()[-1])
    assert not heavy, (
        f"loading {namespace} imports {', '.join(heavy)}; move that import into the module that "
        "`build` names, which is imported on use")


def has_a_distribution(namespace: str) -> None:
    """The plugin is installed under a name and a version, so that saved models can require it."""
    plugin = discovery().load(namespace).plugin
    assert plugin.distribution, f"{namespace} has no distribution: install it with pip"
    assert plugin.version, f"{plugin.distribution} has no version: give it one in pyproject.toml"


def brings_something(namespace: str) -> None:
    """There is at least one name in the namespace."""
    loaded = discovery().load(namespace)
    assert loaded.specs or loaded.catalog is not None, (
        f"{namespace} brings nothing: return specs from one of its hooks")


def catalogue_finds_what_it_lists(namespace: str) -> None:
    """A catalogue finds the names that it lists, which are local, and None for any other."""
    catalog = discovery().load(namespace).catalog
    if catalog is None:
        return
    names = list(catalog.search("*"))
    assert names, f"the catalogue of {namespace} lists nothing for '*'"
    for name in names[:: max(1, len(names) // _SOME)]:
        assert isinstance(name, str), f"the catalogue of {namespace} lists {name!r}, expected text"
        assert "/" not in name, (
            f"the catalogue of {namespace} lists {name!r}; give names without the namespace")
        spec = catalog.find(name)
        assert spec is not None, (
            f"the catalogue of {namespace} lists {name!r} and does not find it; let find give a "
            "spec for every name of search('*')")
        assert name in set(catalog.search(spec.name)) | set(catalog.search(name)), (
            f"the catalogue of {namespace} does not list {name!r} for the pattern {name!r}")
    stranger = "no.such-name"
    assert catalog.find(stranger) is None, (
        f"the catalogue of {namespace} finds {stranger!r}; let find give None for what it has not")


def builder_resolves(spec: AnySpec) -> None:
    """`build`, and of a fusion of weights `measure`, name something that can be called."""
    targets = [spec.build]
    if isinstance(spec, FusionSpec) and spec.measure:
        targets.append(spec.measure)
    for target in targets:
        found = resolve(target, spec.name)
        assert callable(found), (
            f"{target} is a {type(found).__name__}; let it be a function or a class")


def options_are_keyword_only(spec: AnySpec) -> None:
    """Options are explicit keyword-only arguments: no *args, no **kwargs."""
    for name, parameter in inspect.signature(load(spec)).parameters.items():
        kind = parameter.kind
        assert kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), (
            f"{spec.build} takes {'*' if kind == parameter.VAR_POSITIONAL else '**'}{name}; name "
            "every option, so that it can be checked, shown and saved")
        assert kind == parameter.KEYWORD_ONLY or name in _POSITIONAL, (
            f"the argument {name!r} of {spec.build} can be given by position; put a '*' before it")


def options_are_json(spec: AnySpec) -> None:
    """Defaults of options are JSON values of their own types, which a saved model can carry."""
    parameters = inspect.signature(load(spec)).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()
                if parameter.kind == parameter.KEYWORD_ONLY and name not in core_arguments(spec)}
    for name, default in defaults.items():
        try:
            json.dumps(None if default is inspect.Parameter.empty else default, allow_nan=False)
        except (TypeError, ValueError):
            raise AssertionError(f"the default of {name!r} in {spec.build} is {default!r}; let it "
                                 "be a JSON value") from None
    if inspect.Parameter.empty in defaults.values():
        return
    try:
        checked(spec, defaults)
    except OptionError as error:
        raise AssertionError(f"a default of {spec.build} is refused by its own type: {error}; "
                             "correct one of them") from None


def options_can_be_given(spec: AnySpec) -> None:
    """No option has the name of an argument of zoo.backbone, zoo.fuse or zoo.transfer, which
    would get its value."""
    function = _TAKES_OPTIONS.get(type(spec))
    if function is None:
        return
    taken = inspect.signature(function).parameters
    for option in options_of(spec):
        assert option.name not in taken, (
            f"the option {option.name!r} of {spec.name} can never be given: zoo."
            f"{function.__name__} has an argument of that name; rename it")


def options_have_defaults(spec: AnySpec) -> None:
    """A strategy works without a single option being given."""
    if isinstance(spec, FusionSpec | TransferSpec):
        for option in options_of(spec):
            assert option.default, (
                f"the option {option.name!r} of {spec.name} must be given; give it a default")


def options_are_documented(spec: AnySpec) -> None:
    """Every option has a type and a line under `Options:` in the docstring."""
    for option in options_of(spec):
        assert option.type, f"the option {option.name!r} of {spec.name} has no type: annotate it"
        assert option.help, (
            f"the option {option.name!r} of {spec.name} is not described; add a line "
            f"'{option.name}: …' under 'Options:' in the docstring of {spec.build}")


def is_described(spec: AnySpec) -> None:
    """Listings have something to say about it."""
    assert spec.summary or isinstance(spec, BackboneSpec), (
        f"{spec.name} has no summary: say in one line what it does")


CHECKS = (loads_alone_and_is_light, has_a_distribution, brings_something,
          catalogue_finds_what_it_lists)
SPEC_CHECKS = (builder_resolves, options_are_keyword_only, options_can_be_given,
               options_are_json, options_have_defaults, options_are_documented, is_described)
