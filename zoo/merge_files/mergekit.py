"""Read mergekit's YAML: what it asks for, as arguments of `merge`.

Written from mergekit's documentation of the format, for the methods that both have. Where our
strategies know two conventions, theirs is taken, so that the numbers agree.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import RecipeError
from zoo.merge_files.documents import Document, read_documents
from zoo.names import suggest
from zoo.options import options_of
from zoo.registry import find
from zoo.specs import FusionSpec

# mergekit's method → ours, and what is fixed in it.
METHODS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("average", {}),
    "slerp": ("slerp", {}),
    "nuslerp": ("nuslerp", {}),
    "multislerp": ("multislerp", {}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties": ("ties", {}),
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
    "della": ("della", {}),
    "della_linear": ("della_linear", {}),
    "breadcrumbs": ("breadcrumbs", {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {}),
    "sce": ("sce", {}),
}
_RENAMED = {"lambda": "scale", "normalize": "normalise", "normalize_weights": "normalise"}
# Whose base is one of the models that are merged, and not what they started from.
_NO_BASE = ("linear", "slerp", "karcher")
# Where mergekit's defaults are not ours.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "ties": {"density": 1.0}, "dare_linear": {"density": 1.0}, "dare_ties": {"density": 1.0},
    "della": {"density": 1.0}, "della_linear": {"density": 1.0},
    "breadcrumbs": {"density": 1.0}, "breadcrumbs_ties": {"density": 1.0},
    "sce": {"select_topk": 1.0},
}
_IDLE = ("int8_mask", "weight", "t")  # how it stores masks; what is read apart
# What it calls by flags: parameter, its value → our option and value, None for our default.
_FLAGS: Mapping[tuple[str, bool], tuple[str, Any] | None] = {
    ("nuslerp_flatten", True): None,
    ("nuslerp_flatten", False): ("over", "rows"),
    ("nuslerp_row_wise", True): ("over", "rows"),
    ("filter_wise", True): ("over", "rows"),
    ("filter_wise", False): None,
}
_LAYERS = "*.[0-9]*.*"
_TOP = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_SURGERY = ("slices", "modules")
_LEFT_TO_US = ("tokenizer_source", "tokenizer", "chat_template", "name")


def read_mergekit(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments of `zoo.merge` (but `out`) that a mergekit configuration means.

    Models are folders, or repositories of the Hub where there is no such folder. Raises
    RecipeError naming the field for what is not one, or what has no counterpart here: slices of
    layers, densities that differ between models or layers.
    """
    documents = read_documents(file)
    if len(documents) != 1:
        raise RecipeError(str(file), [(None, "", f"has {len(documents)} documents, expected one")])
    return mergekit_arguments(documents[0])


def mergekit_arguments(document: Document, names: Collection[str] = ()) -> dict[str, Any]:
    """The same of one document of several. names: those that other documents have, which may
    stand for models."""
    reader = _Reader(document, names)
    config = document.values
    if not isinstance(config, dict):
        raise reader.wrong("", "expected a mapping with 'merge_method' and 'models'")
    for name in config:
        if name in _SURGERY:
            raise reader.wrong(name, "cutting models into layers is not supported; merge whole "
                               "models, with weights that run along the depth")
        if name not in (*_TOP, *_LEFT_TO_US):
            near = suggest(str(name), _TOP, n=1)
            raise reader.wrong(str(name), "is no field of mergekit's that is known here"
                               + (f"; did you mean {near[0]!r}?" if near else ""))
    return reader.arguments(config)


class _Reader:
    def __init__(self, document: Document, names: Collection[str]) -> None:
        self.document = document
        self.names = names

    def wrong(self, field: str, problem: str) -> RecipeError:
        line = self.document.line(tuple(re.findall(r"[^.\[\]]+", field)))
        return RecipeError(self.document.file, [(line, field, problem)])

    def arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        method = config.get("merge_method")
        if not isinstance(method, str) or method not in METHODS:
            near = suggest(str(method), METHODS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(METHODS)}"
            raise self.wrong("merge_method", f"{method!r} is not known here; {hint}")
        strategy, fixed = METHODS[method]
        models = self._models(config.get("models"))
        base = config.get("base_model")
        if base is not None:
            base = self._place("base_model", base)
        if method == "slerp":
            models = self._two(models, base)
        elif method not in _NO_BASE and base is not None:
            models = [model for model in models if model[0] != base]
        common = config.get("parameters") or {}
        if not isinstance(common, Mapping):
            raise self.wrong("parameters", f"is {common!r}, expected a mapping")
        spec = find(strategy, FusionSpec)
        known = {option.name for option in options_of(spec)}
        options = dict(fixed) | ({"convention": "mergekit"} if "convention" in known else {})
        options |= self._options(method, models, common, known)
        found: dict[str, Any] = {
            "inputs": [place for place, _ in models], "strategy": strategy,
            "weight": self._weights(method, models, common), **options}
        if base is not None and method not in _NO_BASE:
            found["base"] = base
        dtype = config.get("out_dtype") or config.get("dtype")
        return {**found, "dtype": dtype} if dtype else found

    def _models(self, given: Any) -> list[tuple[str, Mapping[str, Any]]]:
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise self.wrong("models", f"is {given!r}, expected a list of models")
        models = []
        for number, told in enumerate(given):
            field = f"models[{number}]"
            if not isinstance(told, Mapping) or "model" not in told:
                raise self.wrong(field, f"is {told!r}, expected a mapping with 'model'")
            parameters = told.get("parameters") or {}
            if not isinstance(parameters, Mapping):
                raise self.wrong(f"{field}.parameters", f"is {parameters!r}, expected a mapping")
            models.append((self._place(f"{field}.model", told["model"]), parameters))
        return models

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

    def _two(
        self, models: list[tuple[str, Mapping[str, Any]]], base: str | None
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """slerp's two models; t runs from the base to the other."""
        if base is not None and base not in [place for place, _ in models]:
            models = [(base, {}), *models]
        if len(models) != 2 or base is None:
            raise self.wrong("models", f"slerp takes two models, of which base_model is one, and "
                             f"there are {len(models)}")
        return sorted(models, key=lambda model: model[0] != base)

    def _options(
        self, method: str, models: Sequence[tuple[str, Mapping[str, Any]]],
        common: Mapping[str, Any], known: set[str],
    ) -> dict[str, Any]:
        """The options: one value each, the same for all models and layers."""
        names = {*common, *(name for _, own in models for name in own)} - set(_IDLE)
        found: dict[str, Any] = {}
        for name in sorted(names):
            flag = (name, bool(common.get(name)))
            if flag in _FLAGS:
                told = _FLAGS[flag]
                found |= {told[0]: told[1]} if told else {}
                continue
            option = _RENAMED.get(name, name)
            if option not in known:
                near = suggest(option, known, n=1)
                raise self.wrong(f"parameters.{name}", f"{method} has no such parameter here"
                                 + (f"; did you mean {near[0]!r}?" if near else ""))
            values = [own.get(name, common.get(name)) for _, own in models]
            if any(value != values[0] for value in values):
                raise self.wrong(f"parameters.{name}", f"differs between the models, {values}; "
                                 "it has one value for all here")
            if isinstance(values[0], (list, Mapping)):
                raise self.wrong(f"parameters.{name}", f"is {values[0]}; only weights may differ "
                                 "between layers here")
            found[option] = values[0]
        return {**_DEFAULTS.get(method, {}), **found}

    def _weights(
        self, method: str, models: Sequence[tuple[str, Mapping[str, Any]]],
        common: Mapping[str, Any],
    ) -> list[Any]:
        if method == "slerp":
            if "t" not in common:
                raise self.wrong("parameters.t", "is missing: the place between the two models")
            t = self._along("parameters.t", common["t"])
            return [_one_minus(t), t]
        return [self._along(f"models[{number}].parameters.weight",
                            own.get("weight", common.get("weight", 1.0)))
                for number, (_, own) in enumerate(models)]

    def _along(self, field: str, setting: Any) -> Any:
        """A number, numbers along the depth, or both by pattern."""
        if isinstance(setting, Mapping):
            setting = [setting]
        conditional = isinstance(setting, list) and bool(setting) and all(
            isinstance(each, Mapping) for each in setting)
        settings = setting if conditional else [{"value": setting}]
        table: dict[str, Any] = {}
        for each in settings:
            part, value = each.get("filter"), self._numbers(field, each.get("value"))
            if part not in (None, "*"):
                table.setdefault(f"*{part}*", value)
                continue
            if isinstance(value, list):  # what is in no layer has the first number there
                table.setdefault(_LAYERS, value)
                value = value[0]
            table.setdefault("*", value)
        return table["*"] if table.keys() == {"*"} else table

    def _numbers(self, field: str, value: Any) -> Any:
        try:
            return [float(each) for each in value] if isinstance(value, list) and value else (
                float(value))
        except (TypeError, ValueError):
            raise self.wrong(field, f"is {value!r}, expected a number or a list of them") from None


def _one_minus(t: Any) -> Any:
    if isinstance(t, Mapping):
        return {pattern: _one_minus(value) for pattern, value in t.items()}
    return [1 - value for value in t] if isinstance(t, list) else 1 - t
