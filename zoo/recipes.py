"""Read and validate a recipe before any work: every name, option and type, with line and field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from zoo.errors import BadName, PluginError, RecipeError, UnknownName
from zoo.names import Name, parse, suggest
from zoo.options import options_of
from zoo.registry import find
from zoo.specs import AnySpec, BackboneSpec, FusionSpec, TransferSpec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class _Open(BaseModel):
    """Further keys are options of the strategy, checked against its own signature."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _data_from_text(value: Any) -> Any:
    return {"data": value} if isinstance(value, str) else value


class Data(_Strict):
    """Labelled images: a file, folder, address or registered name, and which part of it."""

    data: str
    split: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0


DataField: TypeAlias = Annotated[Data, BeforeValidator(_data_from_text)]


class SourceData(_Strict):
    train: DataField


class TargetData(_Strict):
    """What the target learns from, and the test set that nothing is chosen on."""

    train: DataField
    test: DataField
    val: Annotated[float, Field(gt=0, lt=1)] | DataField = 0.1
    unlabelled: DataField | None = None


class AllData(_Strict):
    target: TargetData
    source: SourceData | None = None


class Transfer(_Open):
    """A transfer method; further keys are arguments of `zoo.transfer` or the method's options."""

    method: str = "finetune"
    epochs: Annotated[int, Field(ge=1)] = 10


class Source(_Strict):
    backbone: str
    pretrained: bool = True
    image_size: Annotated[int, Field(ge=1)] | None = None
    transfer: Transfer | None = None


class Target(_Strict):
    backbone: str
    start: str | None = Field(default=None, alias="from", pattern="^source$")
    pretrained: bool = False
    image_size: Annotated[int, Field(ge=1)] | None = None
    transfer: Transfer = Transfer()


class Everything(_Strict):
    """The honest baseline: one model trained on all the data."""

    backbone: str | None = None
    pretrained: bool = False
    image_size: Annotated[int, Field(ge=1)] | None = None
    transfer: Transfer | None = None


class Fuse(_Open):
    """A fusion strategy; further keys are its options. `transfer` trains what it adds."""

    strategy: str
    transfer: Transfer | None = None


class Evaluate(_Strict):
    attacks: dict[str, dict[str, Any]] = {}


class Recipe(_Strict):
    """The four classic steps and what they are measured on."""

    data: AllData
    source: Source
    target: Target
    fuse: Fuse
    update: Transfer | None = None
    everything: Everything = Everything()
    evaluate: Evaluate = Evaluate()
    save: str = "fused"
    seed: int = 0


def read_recipe(given: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file or a mapping.

    Raises RecipeError with one line per problem: file, line, field, what is wrong, and the
    nearest right spelling.
    """
    if isinstance(given, Mapping):
        return _validated(dict(given), "recipe", {})
    file = Path(given).expanduser()
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise RecipeError(str(file), [(None, "", f"cannot be read: {error.strerror}")]) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", error))
        raise RecipeError(str(file), [(mark.line + 1 if mark else None, "",
                                       f"is not YAML: {problem}")]) from None
    if not isinstance(values, dict):
        raise RecipeError(str(file), [(1, "", "is no recipe: expected data, source, target, fuse")])
    return _validated(values, str(file), dict(_lines(node, ())))


def _validated(values: dict[str, Any], file: str, lines: Mapping[tuple[str, ...], int]) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems = [_problem(each, values) for each in error.errors()]
    else:
        problems = list(_wrong_names(recipe))
    if problems:
        raise RecipeError(file, [(_line(lines, loc), ".".join(loc), problem)
                                 for loc, problem in dict(problems).items()])
    return recipe


def _problem(error: Any, values: Any) -> tuple[tuple[str, ...], str]:
    # A part of loc that is no key of the document names a branch of a union.
    loc: list[str] = []
    here = values
    for part in error["loc"]:
        if isinstance(here, Mapping) and (part in here or error["type"] == "missing"):
            loc.append(str(part))
            here = here.get(part)
    if error["type"] == "extra_forbidden":
        near = suggest(loc[-1], _known_fields(tuple(loc[:-1])))
        hint = f"did you mean {near[0]!r}?" if near else (
            f"there are {', '.join(_known_fields(tuple(loc[:-1])))}")
        return tuple(loc), f"is no field here; {hint}"
    if error["type"] == "missing":
        return tuple(loc), "is missing"
    return tuple(loc), f"{error['msg'][0].lower()}{error['msg'][1:]} (it is {error['input']!r})"


def _known_fields(loc: tuple[str, ...]) -> list[str]:
    """The fields of the model at a place in the recipe."""
    model: Any = Recipe
    for part in loc:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        models = [] if field is None else list(_models(field.annotation))
        if not models:
            return []
        model = models[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models(inner)


def _wrong_names(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names that nothing is registered under, and options that their strategies do not have."""
    for step in ("source", "target", "everything"):
        part = getattr(recipe, step)
        if part.backbone:
            yield from _wrong((step, "backbone"), part.backbone, BackboneSpec)
        if part.transfer:
            yield from _wrong_transfer((step, "transfer"), part.transfer)
    yield from _wrong(("fuse", "strategy"), recipe.fuse.strategy, FusionSpec, recipe.fuse.options)
    if recipe.fuse.transfer:
        yield from _wrong_transfer(("fuse", "transfer"), recipe.fuse.transfer)
    if recipe.update:
        yield from _wrong_transfer(("update",), recipe.update)


def _wrong_transfer(
    loc: tuple[str, ...], transfer: Transfer
) -> Iterator[tuple[tuple[str, ...], str]]:
    own = {name: value for name, value in transfer.options.items() if name not in SETTINGS}
    yield from _wrong((*loc, "method"), transfer.method, TransferSpec, own, SETTINGS)


def _wrong(
    loc: tuple[str, ...], name: str, kind: type[AnySpec], options: Mapping[str, Any] | None = None,
    also: tuple[str, ...] = (),
) -> Iterator[tuple[tuple[str, ...], str]]:
    try:
        if kind is BackboneSpec and not isinstance(parse(name), Name):
            return
        spec: AnySpec = find(name, kind)
    except (BadName, UnknownName, PluginError) as error:
        yield loc, str(error)
        return
    known = [option.name for option in options_of(spec)]
    for option in options or ():
        if option not in known:
            near = suggest(option, [*known, *also])
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            yield (*loc[:-1], option), f"{spec.name} has no such option{hint}"


def _lines(node: Any, loc: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    yield loc, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*loc, str(key.value))
            yield from _lines(value, inner)
            yield inner, key.start_mark.line + 1


def _line(lines: Mapping[tuple[str, ...], int], loc: tuple[str, ...]) -> int | None:
    """The line of a field, or of the nearest thing around it."""
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines.get(loc)


# Keywords of zoo.transfer that a recipe may set, beside method and epochs.
SETTINGS = (
    "lr", "batch_size", "optimizer", "weight_decay", "schedule", "warmup_epochs", "loss",
    "label_smoothing", "activation", "augment", "patience", "clip_grad", "precision", "workers",
)
