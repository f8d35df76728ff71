"""The options of a strategy: its builder's own keyword-only arguments.

They are read from the source text, so that `zoo show NAME` prints them without importing torch,
and checked against the evaluated annotations when the strategy is used.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import OptionError
from zoo.names import suggest
from zoo.registry import load
from zoo.specs import Spec

# Keyword-only arguments that the core fills in itself.
CORE_ARGUMENTS = frozenset({
    "base", "data", "labels", "module", "graph", "score", "key", "weight", "weights", "offset",
    "shape", "measured", "device", "dtype", "seed", "out",
    "name", "num_classes", "pretrained", "in_chans", "image_size",
    "criterion", "teachers", "unlabelled", "split",
})


@dataclass(frozen=True, slots=True)
class Option:
    """One option as its builder declares it. `default` is source text (`0.2`), "" if required."""

    name: str
    type: str
    default: str
    help: str


def options_of(spec: Spec) -> tuple[Option, ...]:
    """The options of a strategy in the order of its signature, read without importing it."""
    function, doc = _definition(spec)
    helps = _option_helps(doc)
    options = []
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if argument.arg in CORE_ARGUMENTS:
            continue
        options.append(Option(
            argument.arg,
            ast.unparse(argument.annotation) if argument.annotation else "",
            ast.unparse(default) if default else "",
            helps.get(argument.arg, ""),
        ))
    return tuple(options)


def checked(spec: Spec, given: Mapping[str, object]) -> dict[str, Any]:
    """All options of a strategy: the given ones, checked, and the defaults of the others.

    Raises OptionError for an unknown name (with the nearest and the list), a value of the wrong
    type, a value that is not JSON, or a required one that is missing.
    """
    builder = load(spec)
    declared = {
        name: parameter for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in CORE_ARGUMENTS
    }
    for name in given:
        if name not in declared:
            near = suggest(name, declared)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError(spec.name, f"no option is called {name!r}{hint}", declared)
    values: dict[str, Any] = {}
    for name, parameter in declared.items():
        if name in given:
            values[name] = _checked_value(spec.name, name, given[name], parameter, builder)
        elif parameter.default is inspect.Parameter.empty:
            raise OptionError(spec.name, f"the option {name!r} must be given", declared)
        else:
            values[name] = parameter.default
    return values


def accepts(builder: Callable[..., Any], argument: str) -> bool:
    """Whether a builder takes this keyword: a plugin may take fewer than the core can give."""
    return argument in inspect.signature(builder).parameters


def _checked_value(
    owner: str, name: str, value: object, parameter: inspect.Parameter, builder: Callable[..., Any]
) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise OptionError(
            owner, f"the option {name!r} is {value!r}, expected a JSON value") from None
    annotation = parameter.annotation
    if isinstance(annotation, str):
        function = inspect.unwrap(builder)
        scope = getattr(function.__init__ if inspect.isclass(function) else function,
                        "__globals__", {})
        try:
            annotation = eval(annotation, dict(scope))
        except NameError:
            return value  # a name that exists only for type checkers
    if annotation is inspect.Parameter.empty:
        return value
    import pydantic

    try:
        return pydantic.TypeAdapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"]
        problem = problem[0].lower() + problem[1:]
        raise OptionError(owner, f"the option {name!r} is {value!r}: {problem}") from None


def _definition(spec: Spec) -> tuple[ast.FunctionDef, str]:
    """The builder's definition and docstring; of a class, its `__init__` and the class's own."""
    module, _, attribute = spec.build.partition(":")
    file = _source_file(module)
    for node in ast.parse(file.read_text("utf-8")).body if file else ():
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            return _initialiser(node), ast.get_docstring(node) or ""
    return _imported(spec)


def _source_file(module: str) -> Path | None:
    """Where a module's text lies, found without importing the packages around it."""
    top, _, rest = module.partition(".")
    found = importlib.util.find_spec(top)
    if found is None:
        return None
    if not rest:
        return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    for folder in found.submodule_search_locations or ():
        inner = Path(folder, *rest.split("."))
        for file in (inner.with_name(inner.name + ".py"), inner / "__init__.py"):
            if file.is_file():
                return file
    return None


def _imported(spec: Spec) -> tuple[ast.FunctionDef, str]:
    """For a builder that is re-exported from elsewhere: import it and read where it stands."""
    builder = inspect.unwrap(load(spec))
    node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(builder))).body[0]
    if isinstance(node, ast.ClassDef):
        return _initialiser(node), ast.get_docstring(node) or ""
    if not isinstance(node, ast.FunctionDef):
        raise OptionError(spec.name, f"{spec.build} is neither a function nor a class")
    return node, ast.get_docstring(node) or ""


def _initialiser(node: ast.ClassDef) -> ast.FunctionDef:
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return statement
    empty = ast.parse("def __init__(self): ...").body[0]
    assert isinstance(empty, ast.FunctionDef)
    return empty


def _option_helps(doc: str) -> dict[str, str]:
    """The lines `name: text` under `Options:` in a docstring; deeper lines go on the one above."""
    _, found, block = doc.partition("Options:\n")
    helps: dict[str, str] = {}
    name = ""
    indent = None
    for line in block.splitlines() if found else []:
        if not line.strip():
            break
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        match = re.match(r"\s*(\w+): (.*)", line)
        if match and depth == indent:
            name = match[1]
            helps[name] = match[2].strip()
        elif name:
            helps[name] += " " + line.strip()
    return helps
