"""What a recipe may say. It is read strictly, and what is wrong is told with line and field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
)

from zoo.errors import RecipeError
from zoo.merge_files.documents import Document, Place, Problem, read_documents
from zoo.names import DATA_SCHEMES, MODEL_SCHEMES, is_path, suggest
from zoo.specs import FusionSpec


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class _Open(BaseModel):
    """Further keys are options of what is named, checked against its own signature."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

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
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


DataField: TypeAlias = Annotated[Data, BeforeValidator(_data_from_text)]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]


def _share_or_data(value: Any) -> str:
    return "a share" if isinstance(value, (int, float)) else "a data set"


class SourceData(_Strict):
    train: DataField


class TargetData(_Strict):
    """What the target learns from, and the test set that nothing is trained or chosen on."""

    train: DataField
    test: DataField
    val: Annotated[
        Annotated[Share, Tag("a share")] | Annotated[DataField, Tag("a data set")],
        Discriminator(_share_or_data),
    ] = 0.1
    unlabelled: DataField | None = None


class AllData(_Strict):
    target: TargetData
    source: SourceData | None = None


Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
SOURCE, TARGET = "source", "target"
OneOrMore: TypeAlias = Annotated[int, Field(ge=1)]
ZeroOrMore: TypeAlias = Annotated[int, Field(ge=0)]


class Transfer(_Open):
    """A transfer method and the arguments of `zoo.transfer`, which has the defaults of what is
    left out; further keys are the method's options."""

    method: str = "finetune"
    epochs: OneOrMore | None = None
    lr: Positive | None = None
    batch_size: OneOrMore | None = None
    optimizer: str | None = None
    weight_decay: NotNegative | None = None
    schedule: str | None = None
    warmup_epochs: ZeroOrMore | None = None
    loss: str | None = None
    label_smoothing: NotNegative | None = None
    activation: str | None = None
    augment: str | dict[str, Any] | None = None
    views: OneOrMore | None = None
    patience: OneOrMore | None = None
    clip_grad: Positive | None = None
    precision: str | None = None
    workers: ZeroOrMore | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What is given, method aside, as keywords of `zoo.transfer`."""
        return {**self.model_dump(exclude={"method"}, exclude_none=True), **self.options}


class Backbone(_Open):
    """A network; further keys are its builder's options."""

    backbone: str
    pretrained: bool = False
    image_size: OneOrMore | None = None


class Source(Backbone):
    pretrained: bool = True
    transfer: Transfer = Transfer(method="linear_probe")


class Target(Backbone):
    start: Literal["source"] | None = Field(default=None, alias="from")
    transfer: Transfer = Transfer()


class Everything(_Open):
    """The honest baseline, one model trained on all the data: by default like the target."""

    backbone: str | None = None
    pretrained: bool = False
    image_size: OneOrMore | None = None
    transfer: Transfer | None = None


def _name_or_fusion(value: Any) -> str:
    return "a name" if isinstance(value, str) else "a fusion"


class Fuse(_Open):
    """A fusion strategy; further keys are its options. `transfer` trains what it adds; `weight`,
    `norms`, `search`, `layer` and `pool` are those of `zoo.fuse`.

    members: source and target where nothing is said; else these names, models by name, path or
    address, and fusions of their own. base: one of the same; the untrained source where nothing is
    said.
    """

    strategy: str
    members: Annotated[list[Ingredient], Field(min_length=1)] | None = None
    base: Ingredient | None = None
    transfer: Transfer | None = None
    weight: list[float] | dict[str, Any] | None = None
    norms: Literal["auto", "pooled", "reestimated", "repair"] | None = None
    search: dict[str, Any] | None = None
    layer: str | list[str | list[str] | None] | None = None
    pool: str | list[str | None] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What is given, strategy and transfer aside, as keywords of `zoo.fuse`."""
        own = self.model_dump(include={"weight", "norms", "search", "layer", "pool"},
                              exclude_none=True)
        return {**own, **self.options}

    @property
    def ingredients(self) -> Iterator[tuple[Place, str | Fuse]]:
        """The members and the base, and where each is written."""
        for number, each in enumerate(self.members or (SOURCE, TARGET)):
            yield (("members", str(number)) if self.members else ("strategy",)), each
        if self.base is not None:
            yield ("base",), self.base

    @property
    def others(self) -> Iterator[tuple[Place, str]]:
        """Models that are no part of the recipe, and where each is written."""
        for place, each in self.ingredients:
            if isinstance(each, str) and each not in (SOURCE, TARGET):
                yield place, each

    def takes_base_first(self, spec: FusionSpec) -> bool:
        """Whether the first of two members is the base, of a strategy for a point between a model
        and the one that it started from."""
        return spec.members[1] == 1 and self.base is None and len(self.members or (0, 0)) == 2

    def fusions(self, place: Place) -> Iterator[tuple[Place, Fuse]]:
        """This fusion and those in it, each with its place."""
        yield place, self
        for inner, each in self.ingredients:
            if isinstance(each, Fuse):
                yield from each.fusions((*place, *inner))


Ingredient: TypeAlias = Annotated[
    Annotated[str, Tag("a name")] | Annotated[Fuse, Tag("a fusion")],
    Discriminator(_name_or_fusion),
]
Fuse.model_rebuild()


class Evaluate(_Strict):
    attacks: dict[str, dict[str, Any]] = {}


def _folder_inside(text: str) -> str:
    parts = PurePath(text).parts
    if not parts or PurePath(text).is_absolute() or ".." in parts or parts[0] == "steps":
        raise ValueError("expected the name of a folder inside the run's own, and not 'steps'")
    return text


class Recipe(_Strict):
    """The four classic steps and what they are measured on."""

    data: AllData
    source: Source
    target: Target
    fuse: Fuse
    update: Transfer | None = None
    everything: Everything = Everything()
    evaluate: Evaluate = Evaluate()
    save: Annotated[str, AfterValidator(_folder_inside)] = "fused"
    link_members: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    _document: Document = PrivateAttr(Document("recipe", {}))

    @property
    def baseline(self) -> Target:
        """The network and transfer of `everything`, the target's where it says nothing. Patience
        needs validation data, and here they are trained on."""
        part = self.everything if self.everything.backbone else self.target
        method = self.everything.transfer or self.target.transfer
        return Target(backbone=part.backbone or "", pretrained=part.pretrained,
                      image_size=part.image_size, **part.options,
                      transfer=method.model_copy(update={"patience": None}))

    @property
    def home(self) -> Path:
        """The folder that relative paths start from: the file's own, or the current one."""
        document = self._document
        return Path(document.file).absolute().parent if document.lines else Path.cwd()

    def error(self, problems: Iterable[Problem]) -> RecipeError:
        """What is wrong at these places, with their lines, in the order of the file."""
        return self._document.error(problems)

    def data_place(self, given: str) -> str:
        """Data as they are spelled, a relative path made one from here."""
        table = Path(given).suffix.lower() in (".csv", ".tsv")
        return self._from_home(given, DATA_SCHEMES, table or (self.home / given).exists())

    def model_place(self, given: str) -> str:
        """A backbone as it is spelled, a relative path made one from here."""
        return self._from_home(given, MODEL_SCHEMES, False)

    def _from_home(self, given: str, schemes: tuple[str, ...], path: bool) -> str:
        scheme, colon, location = given.partition(":")
        if colon and scheme in schemes:
            local = scheme in ("folder", "csv", "local-dir")
            return f"{scheme}:{self.home / Path(location).expanduser()}" if local else given
        return str(self.home / Path(given).expanduser()) if path or is_path(given) else given


def read_recipe(given: str | Path | Mapping[str, Any]) -> Recipe:
    """A recipe from a YAML file or a mapping.

    Raises RecipeError with one line per problem: file, line, field, what is wrong, and the
    nearest right spelling.
    """
    if isinstance(given, Mapping):
        return _validated(Document("recipe", dict(given)))
    documents = read_documents(given)
    if len(documents) != 1 or not isinstance(documents[0].values, dict):
        raise RecipeError(str(Path(given).expanduser()), [
            (1, "", "is no recipe: expected data, source, target, fuse")])
    return _validated(documents[0])


def _validated(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.values)
    except ValidationError as error:
        raise document.error(_problem(each, document.values) for each in error.errors()) from None
    recipe._document = document
    return recipe


def _problem(error: Any, values: Any) -> Problem:
    # A part of loc that is no key of the document names a branch of a union.
    loc: list[str] = []
    here = values
    for part in error["loc"]:
        if (isinstance(here, Mapping) and part in here) or (isinstance(here, list) and isinstance(
                part, int)):
            loc.append(str(part))
            here = here[part]
    if error["type"] == "extra_forbidden":
        known = known_fields(tuple(loc[:-1]))
        near = suggest(loc[-1], known)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return tuple(loc), f"is no field here; {hint}"
    if error["type"] == "missing":
        return (*loc, str(error["loc"][-1])), "is missing"
    message = error["msg"].removeprefix("Value error, ")
    return tuple(loc), f"{message[0].lower()}{message[1:]} (it is {error['input']!r})"


def known_fields(place: Place) -> list[str]:
    """The fields that a recipe has at a place."""
    model: Any = Recipe
    for part in place:
        if part.isdigit():  # an item of a list of the same
            continue
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
