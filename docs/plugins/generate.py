"""Write what the code says of itself into the documentation: reference.md, and the list of checks
in testing.md.

    python docs/plugins/generate.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import zoo
from zoo import errors, hookspecs
from zoo.backbones import Preprocessing
from zoo.cache import ask_once
from zoo.fusion.randomness import uniform16
from zoo.options import core_arguments
from zoo.specs import Spec
from zoo.testing import backbones, datasets, fusions, plugins, transfers, weights
from zoo.transfers.objective import Batch, Objective, Phase, Taught

HERE = Path(__file__).parent
SPECS = (zoo.BackboneSpec, zoo.FusionSpec, zoo.TransferSpec, zoo.DatasetSpec)
# By the names under which they are imported.
OBJECTS = {
    "zoo.Catalog": zoo.Catalog, "zoo.backbones.Preprocessing": Preprocessing,
    **{f"zoo.transfers.objective.{each.__name__}": each
       for each in (Objective, Batch, Taught, Phase)},
    "zoo.fusion.randomness.uniform16": uniform16, "zoo.cache.ask_once": ask_once,
}
CHECKS = {
    "The plugin": plugins.CHECKS, "Everything it brings": plugins.SPEC_CHECKS,
    "Fusions of weights": weights.CHECKS, "Fusions of features": fusions.FEATURES,
    "Fusions of outputs": fusions.OUTPUTS, "Networks": backbones.CHECKS,
    "Transfer methods": transfers.CHECKS, "Data sets": datasets.CHECKS,
}
MARKS = "<!-- checks: written by generate.py -->", "<!-- end of checks -->"


def reference() -> str:
    """The text of reference.md."""
    parts = ["# Reference", "Written from the code by `python docs/plugins/generate.py`. Examples "
             "of all of it are in [kinds.md](kinds.md); what of it is public, and how it changes, "
             "in [stability.md](../stability.md).",
             "## Hooks", "Each is marked with `@zoo.hookimpl`, and takes no argument."]
    for name, hook in vars(hookspecs).items():
        if name.startswith("zoo_"):
            parts += [f"### `{_signature(name, hook)}`", _prose(hook)]
    parts += ["## Specs", "Frozen and keyword-only. A spec has the fields of its own kind, and "
              "these:", _fields(Spec, ())]
    common = [field.name for field in dataclasses.fields(Spec)]
    for spec in SPECS:
        parts += [f"### `zoo.{spec.__name__}`", _prose(spec), _fields(spec, common)]
    parts += ["## Keywords", "These arguments of a builder are filled in by the core, and are no "
              "options; a builder takes those that it needs.", _keywords()]
    parts += ["## What builders meet", *_objects()]
    parts += ["## Errors", "In `zoo.errors`. A plugin raises `OptionError(owner, problem)`, "
              "`WeightsError(message)`, `NotFitted(message)` and `DataError(problem)`.", _errors()]
    return "\n\n".join(filter(None, parts)) + "\n"


def checks() -> str:
    """The list of checks in testing.md."""
    parts = []
    for kind, functions in CHECKS.items():
        rows = [f"| `{function.__name__}` | {_cell(inspect.getdoc(function) or '')} |"
                for function in functions]
        parts.append("\n".join((f"| {kind} | |", "| --- | --- |", *rows)))
    return "\n\n".join(parts)


def with_checks(page: str) -> str:
    """The text of testing.md with the list as it is now."""
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n{checks()}\n{MARKS[1]}{after}"


def _signature(name: str, function: Any) -> str:
    """With annotations as they are written, without the quotes of unevaluated ones."""
    return name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(function)))


def _prose(thing: Any) -> str:
    """A docstring without its lines on fields; other lines `name: text` become a list."""
    names = {field.name for field in dataclasses.fields(thing)} \
        if dataclasses.is_dataclass(thing) else set()
    paragraphs = []
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        lines: list[str] = []
        left_out = listed = False
        for line in paragraph.splitlines():
            item = re.match(r"([a-z]\w*): (.*)", line)
            if item:
                left_out, listed = item[1] in names, True
                line = f"- **{item[1]}**: {item[2]}"
            if not left_out:
                lines.append(f"  {line.strip()}" if listed and not item else line)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(filter(None, paragraphs))


def _fields(spec: type[Any], without: Sequence[str]) -> str:
    """A table of a dataclass' fields, with what its docstring says of each."""
    said = _said(inspect.getdoc(spec) or "")
    rows = ["| field | type | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(spec):
        if field.name in without:
            continue
        default = "" if field.default is dataclasses.MISSING else f"`{_plain(field.default)}`"
        rows.append(f"| `{field.name}` | `{_escaped(str(field.type))}` | {default} | "
                    f"{said.get(field.name, '')} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def _said(doc: str) -> dict[str, str]:
    """The lines `name: text` of a docstring, each with the deeper ones below it."""
    found: dict[str, str] = {}
    name = ""
    for line in doc.splitlines():
        item = re.match(r"([a-z]\w*): (.*)", line)
        inner = re.match(r" +([a-z]\w*): (.*)", line)
        if item:
            name = item[1]
            found[name] = item[2]
        elif not line.startswith(" "):
            name = ""
        elif name:
            found[name] += f"<br>`{inner[1]}`: {inner[2]}" if inner else f" {line.strip()}"
    return {name: _escaped(text) for name, text in found.items()}


def _keywords() -> str:
    rows = ["| builder of | keywords |", "| --- | --- |"]
    build = "module:attribute"
    for what, spec in (
        ("a network", zoo.BackboneSpec(name="x", build=build)),
        ("a fusion of weights", zoo.FusionSpec(name="x", build=build, kind="weights")),
        ("a fusion of features", zoo.FusionSpec(name="x", build=build, kind="features")),
        ("a fusion of outputs", zoo.FusionSpec(name="x", build=build, kind="outputs")),
        ("a transfer method", zoo.TransferSpec(name="x", build=build)),
        ("a data set", zoo.DatasetSpec(name="x", build=build)),
    ):
        names = ", ".join(f"`{name}`" for name in sorted(core_arguments(spec)))
        rows.append(f"| {what} | {names} |")
    return "\n".join(rows)


def _objects() -> Iterator[str]:
    for name, thing in OBJECTS.items():
        yield f"### `{name}`"
        if thing is Objective or inspect.isfunction(thing):
            yield f"`{_signature(thing.__name__, thing)}`"
        yield _prose(thing)
        if dataclasses.is_dataclass(thing):
            yield _fields(thing, ())
        if inspect.isclass(thing):
            yield "\n".join(
                f"- `{_signature(method.__name__, method)}`: {_cell(method.__doc__)}"
                for method in vars(thing).values()
                if inspect.isfunction(method) and method.__name__[0] != "_" and method.__doc__)


def _errors() -> str:
    rows = ["| error | |", "| --- | --- |"]
    for name, error in vars(errors).items():
        if inspect.isclass(error) and issubclass(error, zoo.ZooError):
            rows.append(f"| `{name}` | {_cell(error.__doc__ or '')} |")
    return "\n".join(rows)


def _plain(default: object) -> str:
    return re.sub(r"frozenset\(\)", "{}", repr(default))


def _cell(doc: str) -> str:
    return _escaped(" ".join(doc.split()))


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    (HERE / "reference.md").write_text(reference(), "utf-8")
    testing = HERE / "testing.md"
    testing.write_text(with_checks(testing.read_text("utf-8")), "utf-8")
