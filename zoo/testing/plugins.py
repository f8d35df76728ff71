"""Checks of a plugin as a whole, and of every spec whatever its kind."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

from zoo.discovery import discovery
from zoo.options import CORE_ARGUMENTS, options_of
from zoo.registry import load
from zoo.specs import AnySpec, BackboneSpec

_HEAVY = ("torch", "timm", "torchvision", "tensorflow", "keras", "transformers")
# Positional arguments that each kind of builder has.
_POSITIONAL = {"tensors", "states", "dims", "members", "num_classes", "model", "self"}


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


def builder_resolves(spec: AnySpec) -> None:
    """`build` names something that can be called."""
    builder = load(spec)
    assert callable(builder), (
        f"{spec.build} is a {type(builder).__name__}; let `build` name a function or a class")


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
    """Defaults of options are JSON values, which a saved model can carry."""
    for name, parameter in inspect.signature(load(spec)).parameters.items():
        if parameter.kind != parameter.KEYWORD_ONLY or name in CORE_ARGUMENTS:
            continue
        if parameter.default is inspect.Parameter.empty:
            continue
        try:
            json.dumps(parameter.default, allow_nan=False)
        except (TypeError, ValueError):
            raise AssertionError(
                f"the default of {name!r} in {spec.build} is {parameter.default!r}; let it be a "
                "JSON value") from None


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


CHECKS = (loads_alone_and_is_light, has_a_distribution, brings_something)
SPEC_CHECKS = (builder_resolves, options_are_keyword_only, options_are_json,
               options_are_documented, is_described)
