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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from zoo.errors import OptionError
from zoo.names import suggest
from zoo.registry import load
from zoo.specs import FUSION_USES, TRANSFER_USES, FusionSpec, Spec

# Keyword-only arguments that the core fills in itself.
_ALWAYS = frozenset({"base", "data", "device", "dtype", "seed", "out", "weight"})
_BY_KIND: Mapping[str, frozenset[str]] = {
    "backbone": frozenset({"name", "num_classes", "pretrained", "in_chans", "image_size"}),
    "weights": FUSION_USES | {"key", "weights", "offset", "shape", "measured", "depth", "depths",
                             "report"},
    "outputs": frozenset({"dims", "known"}),
    "choice": frozenset({"models"}),
    "transfer": TRANSFER_USES | {"criterion"},
    "dataset": frozenset({"split"}),
}

# The type of an option of a fusion of weights that may have a value of its own for each member. The
# core hands a tuple to the builder, one number per member, whatever the user gave.
PerMember: TypeAlias = Annotated[float | Sequence[float], "one per member"]


@dataclass(frozen=True, slots=True)
class Option:
    """One option as its builder declares it. `default` is source text (`0.2`), "" if required."""

    name: str
    type: str
    default: str
    help: str


def core_arguments(spec: Spec) -> frozenset[str]:
    """The keywords of a builder that are no options, because the core fills them in."""
    kind = spec.kind if isinstance(spec, FusionSpec) else spec.kind_name
    return _ALWAYS | _BY_KIND.get(kind, frozenset())


def options_of(spec: Spec) -> tuple[Option, ...]:
    """The options of a strategy in the order of its signature. They are read from the source;
    the builder is imported only where that does not tell, as for a re-exported one."""
    definition = _definition(spec.build)
    if definition is None:
        return _options_of_builder(load(spec), core_arguments(spec))
    function, doc = definition
    helps = _option_helps(doc)
    return tuple(
        Option(argument.arg, ast.unparse(argument.annotation) if argument.annotation else "",
               ast.unparse(default) if default else "", helps.get(argument.arg, ""))
        for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults,
                                     strict=True)
        if argument.arg not in core_arguments(spec))


def checked(spec: Spec, given: Mapping[str, object]) -> dict[str, Any]:
    """All options of a strategy: the given ones, checked, and the defaults of the others.

    A number without a fraction counts as a float, a tuple as a list. In place of a number or truth
    value a fusion of weights may be given lists and mappings of them, for members and tensors (see
    `zoo.fusion.weighting`); these are only checked one by one, and whole numbers have no lists.
    Raises OptionError for an unknown name (with the nearest and the list), a value of the wrong
    type, a value that is not JSON (nor are NaN and infinity), or a required one that is missing.
    """
    builder = load(spec)
    declared = _declared(builder, core_arguments(spec))
    for name in given:
        if name not in declared:
            near = suggest(name, declared)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            none = "" if declared else "; it has none"
            raise OptionError(spec.name, f"no option is called {name!r}{hint}{none}", declared)
    values: dict[str, Any] = {}
    for name, parameter in declared.items():
        if name in given:
            annotation = _annotation(parameter, builder)
            values[name] = _checked_value(spec.name, name, given[name], float if annotation
                                          == PerMember else annotation, _varies(spec, annotation))
        elif parameter.default is inspect.Parameter.empty:
            raise OptionError(spec.name, f"the option {name!r} must be given", declared)
        else:
            values[name] = parameter.default
    return values


def by_member(spec: Spec, builder: Callable[..., Any]) -> frozenset[str]:
    """The options of a strategy that may have a value of their own for each member."""
    return frozenset(name for name, annotation in _annotations(spec, builder).items()
                     if annotation == PerMember)


def by_tensor(spec: Spec, builder: Callable[..., Any]) -> frozenset[str]:
    """Those that may differ between tensors, or be written as if they could."""
    return frozenset(name for name, annotation in _annotations(spec, builder).items()
                     if _varies(spec, annotation))


def accepts(builder: Callable[..., Any], argument: str) -> bool:
    """Whether a builder takes this keyword: a plugin may take fewer than the core can give."""
    return argument in inspect.signature(builder).parameters


def _declared(
    builder: Callable[..., Any], filled_in: Collection[str]
) -> dict[str, inspect.Parameter]:
    return {
        name: parameter for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in filled_in
    }


def _annotations(spec: Spec, builder: Callable[..., Any]) -> dict[str, Any]:
    return {name: _annotation(parameter, builder)
            for name, parameter in _declared(builder, core_arguments(spec)).items()}


def _varies(spec: Spec, annotation: Any) -> bool:
    """Whether an option may differ between tensors or members."""
    if not isinstance(spec, FusionSpec) or spec.kind != "weights":
        return False
    return annotation == PerMember or (spec.scope != "model"
                                       and _kinds(annotation) <= {float, int, bool})


def _kinds(annotation: Any) -> set[Any]:
    """The types that an option may have, None aside."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    return set(parts) - {NoneType}


def _checked_value(
    owner: str, name: str, value: object, annotation: Any, varies: bool = False
) -> Any:
    if varies and isinstance(value, Mapping):
        return {pattern: _checked_value(owner, name, each, annotation, varies)
                for pattern, each in value.items()}
    if varies and isinstance(value, list | tuple):
        if int in _kinds(annotation) and float not in _kinds(annotation):
            raise OptionError(owner, f"the option {name!r} is {value!r}, expected a whole number "
                              "or {pattern: whole number}; only fractions run along the depth")
        return [_checked_value(owner, name, each, annotation, varies) for each in value]
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise OptionError(owner, f"the option {name!r} is {value!r}, expected a JSON value: a "
                          "finite number, text, true, false, null, or lists and mappings of "
                          "these") from None
    if annotation is inspect.Parameter.empty:
        return value
    import pydantic

    try:
        # As JSON, because a strict check of Python's own types would refuse a list for a tuple.
        return pydantic.TypeAdapter(annotation).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # Parts of the place that are text may also name the branches of a union.
        place = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        problem = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        where = f" at {place}" if place else ""
        raise OptionError(owner, f"the option {name!r} is {value!r}: {problem}{where}") from None
    except pydantic.PydanticUserError:
        return value  # a type that has no JSON form; the builder knows what it wants


def _annotation(parameter: inspect.Parameter, builder: Callable[..., Any]) -> Any:
    """The evaluated annotation; `empty` where there is none, or only for type checkers."""
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    function = inspect.unwrap(builder)
    if inspect.isclass(function):
        function = function.__init__
    try:
        return eval(parameter.annotation, dict(getattr(function, "__globals__", {})))
    except (NameError, AttributeError):
        return inspect.Parameter.empty


def _definition(build: str) -> tuple[ast.FunctionDef, str] | None:
    """The builder's definition and docstring, of a class its `__init__` and the class's own; None
    when the module's text does not have them."""
    module, _, attribute = build.partition(":")
    file = _source_file(module)
    for node in ast.parse(file.read_text("utf-8")).body if file else ():
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef) and node.name == attribute:
            for statement in node.body:
                if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                    return statement, ast.get_docstring(node) or ""
    return None


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


def _options_of_builder(
    builder: Callable[..., Any], filled_in: Collection[str]
) -> tuple[Option, ...]:
    helps = _option_helps(inspect.getdoc(builder) or "")
    return tuple(
        Option(name, _type_text(parameter.annotation),
               "" if parameter.default is inspect.Parameter.empty else repr(parameter.default),
               helps.get(name, ""))
        for name, parameter in _declared(builder, filled_in).items())


def _type_text(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


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
