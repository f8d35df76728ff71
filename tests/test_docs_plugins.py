"""What the pages for authors say of the code is what the code says and does."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_plugins import STATES, WEIGHTS
from test_docs import PLUGIN_PAGES, ROOT, blocks

import zoo
from zoo import hookspecs
from zoo.testing import checks

DOCS = ROOT / "docs"
SOURCES = sorted(file for file in ROOT.glob("plugins/*/**/*.py"))


def public() -> dict[str, set[str]]:
    """Module → names, from the table in stability.md."""
    rows = re.findall(r"^\| `(zoo[\w.]*)` \| (.*) \|$", (DOCS / "stability.md").read_text("utf-8"),
                      re.MULTILINE)
    table = {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}
    errors = vars(importlib.import_module("zoo.errors"))
    table["zoo.errors"] = {name for name, value in errors.items()
                           if inspect.isclass(value) and issubclass(value, zoo.ZooError)}
    return table


def used(text: str) -> Iterator[tuple[str, str]]:
    """Each module and name of zoo that a file uses, however it gets at it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = node.module == "zoo" and inner in public()
                yield (inner, "") if is_module else (node.module, alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) \
                and node.value.id == "zoo":
            yield "zoo", node.attr


def test_the_reference_is_what_the_code_says() -> None:
    generate = runpy.run_path(str(DOCS / "plugins" / "generate.py"))
    told = "run: python docs/plugins/generate.py"
    assert (DOCS / "plugins" / "reference.md").read_text("utf-8") == generate["reference"](), told
    page = (DOCS / "plugins" / "testing.md").read_text("utf-8")
    assert page == generate["with_checks"](page), told


def test_the_reference_has_every_hook_with_its_exact_signature_and_every_field() -> None:
    page = (DOCS / "plugins" / "reference.md").read_text("utf-8")
    hooks = [(name, function) for name, function in vars(hookspecs).items()
             if name.startswith("zoo_")]
    assert len(hooks) >= 5
    for name, function in hooks:
        assert f"### `{name}{inspect.signature(function)}`".replace("'", "") in page
    for spec in (zoo.BackboneSpec, zoo.FusionSpec, zoo.TransferSpec, zoo.DatasetSpec):
        for field in (each.name for each in dataclasses.fields(spec)):
            row = re.search(rf"^\| `{field}` \|.*\| (.*) \|$", page, re.MULTILINE)
            assert row is not None
            assert row[1].strip(), f"say in the docstring what {field} is"


def test_the_list_of_checks_is_complete() -> None:
    page = (DOCS / "plugins" / "testing.md").read_text("utf-8")
    for check in checks("zoo"):
        assert f"| `{check.name}` | " in page


def test_what_is_public_exists() -> None:
    table = public()
    assert table["zoo"] == set(zoo.__all__)
    assert table["zoo.testing"] == set(importlib.import_module("zoo.testing").__all__)
    for module, names in table.items():
        assert names, module
        for name in names:
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_plugins_use_only_what_is_public(file: Path) -> None:
    for module, name in used(file.read_text("utf-8")):
        if module.partition(".")[0] == "zoo":
            assert module in public(), module
            assert not name or name in public()[module], f"{module}.{name}"


def test_snippets_use_only_what_is_public() -> None:
    for page in PLUGIN_PAGES:
        for _, text in blocks(page, "python"):
            for module, name in used(text):
                if module.partition(".")[0] == "zoo":
                    assert not name or name in public()[module], f"{page.name}: {module}.{name}"


def test_uses_are_found_wherever_they_stand() -> None:
    text = ("import zoo.names\nfrom zoo import discovery, info\n"
            "def f():\n    from zoo.fusion.heads import align_heads\n    return zoo.secret\n")
    assert set(used(text)) == {("zoo.names", ""), ("zoo.discovery", ""), ("zoo", "info"),
                               ("zoo.fusion.heads", "align_heads"), ("zoo", "secret")}


@pytest.mark.parametrize(("scope", "plugin", "given"), [
    ("tensor", WEIGHTS, "tensors, *, key"), ("model", STATES, "states, *, weights")])
def test_builders_of_weights_are_given_every_keyword_that_is_documented(
    install: Callable[..., Path], scope: str, plugin: str, given: str
) -> None:
    page = (DOCS / "plugins" / "kinds.md").read_text("utf-8")
    row = re.search(rf'^\| `"{scope}"` \| `\((.*), …options\) -> \w+` \|$', page, re.MULTILINE)
    assert row
    uses = 'uses={"base", "data", "labels", "module", "graph", "score"}, summary'
    source = plugin.replace(given, row[1]).replace("summary", uses, 1)
    if "measured" in row[1]:
        source = source.replace("kind=", 'measure="zoo_acme:measure", kind=', 1)
        source += "\ndef measure(tensors, *, measured):\n    return None if measured else 1\n"
    install("acme", source)
    failed = [check for check in checks("acme") if check.name == "inputs_stay_as_they_are"]
    assert len(failed) == 1
    failed[0]()
