"""Read mergekit's YAML: what it asks for, as arguments of `merge`.

Written from mergekit's documentation of the format, for the methods that both have. Where our
strategies know two conventions, theirs is taken, so that the numbers agree.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.errors import RecipeError
from zoo.fusion.depth import layers
from zoo.merge_files.documents import Document, read_documents
from zoo.merge_files.folders import located
from zoo.merge_files.gradients import Conditions, conditions, spread
from zoo.names import suggest
from zoo.options import Option, options_of
from zoo.registry import find
from zoo.specs import FusionSpec
from zoo.tensors import open_tensors

# mergekit's method → ours.
METHODS: Mapping[str, str] = {
    "linear": "average", **{name: name for name in (
        "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "task_arithmetic", "ties",
        "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
        "sce")}}
# The parameters that models have of their own there; all others are taken from slices and document.
_OF_MODELS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "nuslerp", "multislerp", "task_arithmetic"), ("weight",)),
    **dict.fromkeys(("ties", "dare_linear", "dare_ties"), ("weight", "density")),
    **dict.fromkeys(("della", "della_linear"), ("weight", "density", "epsilon")),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), ("weight", "density", "gamma"))}
_RENAMED = {"lambda": "scale", "normalize": "normalise", "normalize_weights": "normalise"}
# Whose base is one of the models that are merged, and not what they started from.
_NO_BASE = ("linear", "slerp", "karcher")
# Where mergekit's defaults are not ours.
_DEFAULTS: Mapping[str, Any] = {"density": 1.0, "select_topk": 1.0}
# Without effect on the numbers: how masks are stored, and what a method does not look at.
_QUIET = ("int8_mask",)
_UNUSED = ("weight", "density", "t")
_FLAGS = ("nuslerp_flatten", "nuslerp_row_wise", "filter_wise")
_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype")
_LEFT_TO_US = ("tokenizer_source", "tokenizer", "chat_template", "name")

Scope = Mapping[str, Any]


def read_mergekit(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `zoo.merge` (but `out`) that a mergekit configuration means.

    Models are folders, or repositories of the Hub where there is no such folder. Slices that
    together are whole models in their order are read as such. Raises RecipeError naming the field
    for what is not one, or what has no counterpart here. Warns of what mergekit ignores.
    """
    documents = read_documents(file)
    if len(documents) != 1:
        raise RecipeError(str(file), [(None, "", f"has {len(documents)} documents, expected one")])
    return mergekit_arguments(documents[0])


def floating_keys(place: str) -> list[str]:
    """The keys of a model that a merge is about."""
    state = open_tensors(located(place)[0])
    return [key for key in state if state.dtype(key).is_floating_point]


def mergekit_arguments(
    document: Document, names: Collection[str] = (),
    keys_of: Callable[[str], Collection[str]] = floating_keys,
) -> dict[str, Any]:
    """The same of one document of several. names: those that other documents have, which may
    stand for models. keys_of: the tensors of a model; asked where tensors or layers differ."""
    reader = _Reader(document, names, keys_of)
    config = document.values
    if not isinstance(config, dict):
        raise reader.wrong("", "expected a mapping with 'merge_method' and 'models'")
    for name in config:
        if name == "modules":
            raise reader.wrong(name, "merging parts of models by different rules is not supported; "
                               "merge whole models, with parameters that differ by 'filter'")
        if name not in (*_TOP, *_LEFT_TO_US):
            near = suggest(str(name), _TOP, n=1)
            raise reader.wrong(str(name), "is no field of mergekit's that is known here"
                               + (f"; did you mean {near[0]!r}?" if near else ""))
    return reader.arguments(config)


@dataclass(frozen=True)
class _Model:
    """A model to merge, and its own parameters in each slice with their fields."""

    place: str
    own: tuple[tuple[str, Scope], ...]


@dataclass(frozen=True)
class _Sliced:
    """The models of all slices, in the first one's order; the slices' parameters and lengths, of
    whole models none."""

    models: list[_Model]
    shared: tuple[tuple[str, Scope], ...] = (("", {}),)
    lengths: tuple[int | None, ...] = (None,)
    base: str | None = None


class _Reader:
    def __init__(
        self, document: Document, names: Collection[str],
        keys_of: Callable[[str], Collection[str]],
    ) -> None:
        self.document = document
        self.names = names
        self.keys_of = keys_of
        self.keys: list[str] | None = None

    def wrong(self, field: str, problem: str) -> RecipeError:
        line = self.document.line(tuple(re.findall(r"[^.\[\]]+", field)))
        return RecipeError(self.document.file, [(line, field, problem)])

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        method = config.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            near = suggest(str(method), METHODS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}"
            raise self.wrong("merge_method", f"{method!r} is not known here; {hint}")
        if (config.get("models") is None) == (config.get("slices") is None):
            raise self.wrong("models", f"is {config.get('models')!r}, expected a list of models, "
                             "or 'slices' in their place")
        given = self._sliced(config["slices"]) if config.get("models") is None else _Sliced(
            [_Model(place, (own,)) for place, own in self._sources("models", config["models"])])
        base = config.get("base_model") or given.base
        if base is not None:
            base = self._place("base_model", base)
        if given.base is not None and self._place("base_model", given.base) != base:
            raise self.wrong("slices[0].base_model", f"is {given.base!r}, and the document's is "
                             f"{base!r}; whole models have one base")
        models = given.models
        if method == "slerp":
            models = self._two(given, base)
        elif method not in _NO_BASE and base is not None:
            models = [model for model in models if model.place != base]
        if not models:
            raise self.wrong("slices" if config.get("models") is None else "models",
                             f"has no model but the base; {method} needs others")
        self._want_all_layers(given, models, base)
        common = self._mapping("parameters", config.get("parameters"))
        found: dict[str, Any] = {
            "inputs": [model.place for model in models], "strategy": METHODS[method],
            **_Parameters(self, method, models, given, common).options()}
        if base is not None and method not in _NO_BASE:
            found["base"] = base
        dtype = config.get("out_dtype") or config.get("dtype")
        return {**found, "dtype": dtype} if dtype else found

    def first_keys(self, models: Sequence[_Model]) -> list[str]:
        if self.keys is None:
            self.keys = list(self.keys_of(models[0].place))
        return self.keys

    def _mapping(self, field: str, given: Any) -> Scope:
        if given is not None and not isinstance(given, Mapping):
            raise self.wrong(field, f"is {given!r}, expected a mapping")
        return given or {}

    def _sources(self, field: str, given: Any) -> list[tuple[str, tuple[str, Scope]]]:
        """The models of a list, with their parameters and the field of these."""
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise self.wrong(field, f"is {given!r}, expected a list of models")
        found: list[tuple[str, tuple[str, Scope]]] = []
        for number, told in enumerate(given):
            where = f"{field}[{number}]"
            if not isinstance(told, Mapping) or "model" not in told:
                raise self.wrong(where, f"is {told!r}, expected a mapping with 'model'")
            place = self._place(f"{where}.model", told["model"])
            if place in [each for each, _ in found]:
                raise self.wrong(f"{where}.model", f"{told['model']!r} stands here twice")
            for name in told.keys() - {"model", "parameters", "layer_range"}:
                warnings.warn(f"{where}.{name} is ignored, as mergekit does; what a model has of "
                              "its own stands under its 'parameters'", stacklevel=6)
            own = self._mapping(f"{where}.parameters", told.get("parameters"))
            found.append((place, (f"{where}.parameters", own)))
        return found

    def _sliced(self, given: Any) -> _Sliced:
        """Slices that give every layer of the same models once, in order."""
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise self.wrong("slices", f"is {given!r}, expected a list of slices")
        own: dict[str, list[tuple[str, Scope]]] = {}
        shared: list[tuple[str, Scope]] = []
        lengths: list[int] = []
        bases = []
        for number, told in enumerate(given):
            field = f"slices[{number}]"
            if not isinstance(told, Mapping) or not told.get("sources"):
                raise self.wrong(field, f"is {told!r}, expected a mapping with 'sources'")
            sources = self._sources(f"{field}.sources", told["sources"])
            if number and {place for place, _ in sources} != own.keys():
                raise self.wrong(f"{field}.sources", "has other models than slices[0]; here all "
                                 "layers are merged from the same ones")
            for place, parameters in sources:
                own.setdefault(place, []).append(parameters)
            for which, source in enumerate(told["sources"]):
                self._want_range(f"{field}.sources[{which}].layer_range",
                                 source.get("layer_range"), sum(lengths),
                                 told["sources"][0].get("layer_range"))
            start, stop = told["sources"][0]["layer_range"]
            lengths.append(stop - start)
            shared.append((f"{field}.parameters",
                           self._mapping(f"{field}.parameters", told.get("parameters"))))
            bases.append(told.get("base_model"))
            if bases[number] != bases[0]:
                raise self.wrong(f"{field}.base_model", f"is {bases[number]!r}, and that of "
                                 f"slices[0] is {bases[0]!r}; whole models have one base")
        return _Sliced([_Model(place, tuple(each)) for place, each in own.items()],
                       tuple(shared), tuple(lengths), bases[0])

    def _want_range(self, field: str, given: Any, start: int, first: Any) -> None:
        if not (isinstance(given, Sequence) and len(given) == 2
                and all(isinstance(end, int) for end in given) and given[0] < given[1]):
            raise self.wrong(field, f"is {given!r}, expected the first layer and the one after the "
                             "last, as in [0, 16]")
        if list(given) != list(first):
            raise self.wrong(field, f"is {given}, and that of the first source {first}; layers are "
                             "merged with those at the same place here")
        if given[0] != start:
            raise self.wrong(field, f"begins at {given[0]}, expected {start}: a merge here keeps "
                             "the models' own layers, each once and in order")

    def _want_all_layers(
        self, given: _Sliced, models: Sequence[_Model], base: str | None
    ) -> None:
        if given.lengths == (None,):
            return
        count = max(layers(self.first_keys(models)).values(), default=-1) + 1
        last = sum(length or 0 for length in given.lengths)
        if last != count:
            raise self.wrong(f"slices[{len(given.lengths) - 1}].sources[0].layer_range", f"ends at "
                             f"{last}, and {models[0].place} has {count} layers; a merge here "
                             "keeps all of them")

    def _place(self, field: str, given: Any) -> str:
        """A folder that is there, or a repository of the Hub."""
        if not isinstance(given, str):
            raise self.wrong(field, f"is {given!r}, expected a folder or a repository")
        if given in self.names or Path(given).expanduser().exists():
            return given
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", given):
            return f"hf-hub:{given}"
        near = suggest(given, self.names, n=1)
        raise self.wrong(field, f"there is no folder {given!r}"
                         + (f"; did you mean the merge {near[0]!r}?" if near else ""))

    def _two(self, given: _Sliced, base: str | None) -> list[_Model]:
        """slerp's two models; t runs from the base to the other."""
        models = given.models
        if base is not None and base not in [model.place for model in models]:
            models = [_Model(base, (("", {}),) * len(given.lengths)), *models]
        if len(models) != 2 or base is None:
            raise self.wrong("models", f"slerp takes two models, of which base_model is one, and "
                             f"there are {len(models)}")
        return sorted(models, key=lambda model: model.place != base)


class _Parameters:
    """mergekit's parameters of one merge, as weights and options of ours."""

    def __init__(
        self, reader: _Reader, method: str, models: Sequence[_Model], given: _Sliced, common: Scope
    ) -> None:
        self.reader, self.method, self.models, self.given = reader, method, models, given
        # Of each slice, from the nearest to the farthest.
        self.shared = [(each, ("parameters", common)) for each in given.shared]
        self.known = {option.name: option for option
                      in options_of(find(METHODS[method], FusionSpec))}

    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = (
            {"convention": "mergekit"} if "convention" in self.known else {})
        of_models = _OF_MODELS.get(self.method, ())
        if "weight" in of_models:
            found["weight"] = [self._of(model, "weight", float, 1.0) for model in self.models]
        shared = {name: field for scopes in self.shared for field, scope in scopes
                  for name in scope}
        own = {name: field for model in self.models for field, scope in model.own
               for name in scope}
        for name, field in sorted({**own, **shared}.items()):
            option = _RENAMED.get(name, name)
            if name in _QUIET or (name in of_models and name == "weight"):
                continue
            if name in _FLAGS and name in shared:
                self._want_one(field, name)
            elif name in of_models:
                told = self.known[option]
                rows = [self._of(model, name, float, self._default(told)) for model in self.models]
                found[option] = rows[0] if rows and all(
                    row == rows[0] and isinstance(row, float) for row in rows) else rows
            elif option not in self.known and name == "rescale" and self.method in _OF_MODELS:
                self._want_no_rescaling(field)
            elif name not in shared or (option not in self.known and name in _UNUSED):
                self._known(field, name)
                warnings.warn(f"{field}.{name} is ignored, as mergekit does: {self.method} "
                              + ("takes it from the 'parameters' of the document or a slice"
                                 if option in self.known else "does not use it"), stacklevel=6)
            else:
                self._known(field, name)
                told = self.known[option]
                found[option] = self._of(None, name, _kind(told), self._default(told))
        if self.method == "slerp" and "t" not in found:
            raise self.reader.wrong("parameters.t", "is missing: the place between the two models")
        if flags := self._flags():
            found["over"] = flags
        return {**{name: value for name, value in _DEFAULTS.items() if name in self.known}, **found}

    def _of(self, model: _Model | None, name: str, kind: type, default: Any) -> Any:
        """A parameter of a model, or of all of them."""
        slices: list[Conditions] = []
        last = "parameters"
        for number, scopes in enumerate(self.shared):
            asked: list[tuple[str | None, Any]] = []
            for field, scope in ((model.own[number], *scopes) if model else scopes):
                if name in scope and (not asked or asked[-1][0] is not None):
                    last = field
                    asked += self._read(f"{field}.{name}", scope[name], kind)
            if not asked or (asked[-1][0] is not None and name != "weight"):
                asked.append((None, default))
            slices.append(asked)
        try:
            return spread(slices, self.given.lengths, lambda: self.reader.first_keys(self.models))
        except KeyError as error:
            raise self.reader.wrong(f"{last}.{name}", f"no condition holds for {error.args[0]!r}; "
                                    "end with one that has no filter") from None

    def _read(self, field: str, setting: Any, kind: type) -> Iterator[tuple[str | None, Any]]:
        expected = {float: "a number or a list of them", int: "a whole number", bool: "true or "
                    "false"}[kind]
        try:
            for part, value in conditions(setting):
                values = value if isinstance(value, list) else [value]
                read = [kind(each) for each in values]
                if not read or (kind is not float and read != values):
                    raise ValueError
                yield part, read if isinstance(value, list) else read[0]
        except (TypeError, ValueError):
            raise self.reader.wrong(field, f"is {setting!r}, expected {expected}, or conditions "
                                    "with 'filter' and 'value'") from None

    def _default(self, option: Option) -> Any:
        return _DEFAULTS.get(option.name, ast.literal_eval(option.default))

    def _known(self, field: str, name: str) -> None:
        option = _RENAMED.get(name, name)
        if option not in self.known and name not in _UNUSED:
            near = suggest(option, self.known, n=1)
            raise self.reader.wrong(f"{field}.{name}", f"{self.method} has no such parameter here"
                                    + (f"; did you mean {near[0]!r}?" if near else ""))

    def _want_one(self, field: str, name: str) -> None:
        values = [self._flag(name, scopes) for scopes in self.shared]
        if any(not isinstance(value, bool) or value != values[0] for value in values):
            told = ", ".join(dict.fromkeys(map(repr, values)))
            raise self.reader.wrong(f"{field}.{name}", f"is {told}; it says what one vector is, "
                                    "and is true or false for all layers here")

    def _flag(self, name: str, scopes: Sequence[tuple[str, Scope]]) -> Any:
        """What a slice says, or mergekit's default."""
        return next((scope[name] for _, scope in scopes if name in scope),
                    name == "nuslerp_flatten")

    def _want_no_rescaling(self, field: str) -> None:
        used = self.method != "task_arithmetic" and any(
            scope.get("rescale") for scopes in self.shared for _, scope in scopes)
        if used:
            raise self.reader.wrong(f"{field}.rescale", f"{self.method} keeps what it does not "
                                    "drop as it is here; leave it out, or use 'lambda'")

    def _flags(self) -> str:
        """What is one vector, where that is not the tensor."""
        flags = {name: self._flag(name, self.shared[0]) for name in _FLAGS}
        if self.method == "model_stock":
            return "rows" if flags["filter_wise"] else ""
        if self.method != "nuslerp" or flags["nuslerp_flatten"]:
            return ""
        return "columns" if flags["nuslerp_row_wise"] else "rows"


def _kind(option: Option) -> type:
    return bool if option.type.startswith("bool") else int if option.type == "int" else float
