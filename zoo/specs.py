"""Frozen descriptions that plugins hand to the registry. Standard library only: a plugin that
describes itself must not pay for torch."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

from zoo.errors import SpecError

KINDS = ("weights", "features", "outputs", "choice")
SCOPES = ("slice", "rows", "tensor", "model")
MEASURED_OVER = ("nothing", "tensor", "model")
TAKES = ("vectors", "tokens", "maps")
FUSION_USES = frozenset({"base", "data", "labels", "module", "graph", "score"})
TRANSFER_USES = frozenset({"unlabelled", "teachers"})
FAMILIES = ("traditional", "adversarial-transfer", "adversarial-training", "distillation")

_BUILD = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_VERSION = re.compile(r"(\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?)?")
_NAME = re.compile(r"([a-z][a-z0-9_-]*/)?[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What every spec has.

    name: the name inside the plugin's namespace (`gated`); the registry hands specs out with
        the full one (`acme/gated`).
    build: `"module:attribute"`, imported when the thing is used and not before.
    summary: one line for listings.
    paper: where it comes from (`Yadav 2023, arXiv:2306.01708`).
    license: SPDX identifier of the code, and for a backbone of its weights; "" when unknown.
    aliases: older spellings; they still work and warn with the new one.
    loads_since: the oldest version of your distribution that can load what this version saves.
    """

    kind_name: ClassVar[str] = "thing"

    name: str
    build: str
    summary: str = ""
    paper: str = ""
    license: str = ""
    aliases: tuple[str, ...] = ()
    loads_since: str = ""

    def __post_init__(self) -> None:
        self._want(isinstance(self.name, str) and bool(_NAME.fullmatch(self.name)),
                   "name", "letters, digits and '._+-', like 'gated'")
        self._want(isinstance(self.build, str) and bool(_BUILD.fullmatch(self.build)),
                   "build", "'module:attribute', like 'zoo_acme.gated:build'")
        for field in ("summary", "paper", "license", "loads_since"):
            self._want(isinstance(getattr(self, field), str), field, "text")
        self._want(bool(_VERSION.fullmatch(self.loads_since)), "loads_since",
                   "a version, like '0.3'")
        self._freeze("aliases", tuple)
        self._want(all(isinstance(alias, str) and _NAME.fullmatch(alias) for alias in self.aliases),
                   "aliases", "a sequence of names")

    def _want(self, right: bool, field: str, expected: str) -> None:
        if not right:
            given = getattr(self, field)
            raise SpecError(f"{type(self).__name__}({self.name!r}): {field} is {given!r}, "
                            f"expected {expected}")

    def _freeze(self, field: str, frozen: Callable[[Iterable[Any]], Any]) -> None:
        value = getattr(self, field)
        self._want(isinstance(value, Iterable) and not isinstance(value, str), field, "a sequence")
        object.__setattr__(self, field, frozen(value))


@dataclass(frozen=True, kw_only=True)
class BackboneSpec(Spec):
    """A network: `build(*, num_classes, pretrained, in_chans=3, …options) -> nn.Module`.

    The module has timm's semantics (`num_features`, `forward_features(x)`,
    `forward_head(z, pre_logits=False)`, `reset_classifier(n)`, `get_classifier()`) and
    `preprocessing`, a `zoo.backbones.Preprocessing` (or a mapping with its fields). A builder
    that can change the input size has an `image_size` option. Weights that cannot be reached
    are an error, never silently random.

    input_size: (channels, height, width) of the pretrained weights.
    feature_dim: D of the pooled features, 0 when unknown.
    weights: where the pretrained weights come from, "" when there are none.
    """

    kind_name: ClassVar[str] = "backbone"

    input_size: tuple[int, int, int] = (3, 224, 224)
    feature_dim: int = 0
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze("input_size", tuple)
        self._want(len(self.input_size) == 3
                   and all(isinstance(n, int) and n > 0 for n in self.input_size),
                   "input_size", "(channels, height, width)")
        self._want(isinstance(self.feature_dim, int) and self.feature_dim >= 0,
                   "feature_dim", "a whole number, 0 when unknown")
        self._want(isinstance(self.weights, str), "weights", "text")


@dataclass(frozen=True, kw_only=True)
class FusionSpec(Spec):
    """A way of making one model of several. What `build` is depends on the kind:

    weights: a function `(tensors, *, base, key, weight, …options) -> Tensor`; scope `"slice"`
        gives it flat parts, with their `offset` in the tensor and its `shape`; scope `"rows"` the
        same, cut between rows only (one index of the first axis each; a vector is one row); scope
        `"model"` makes it `(states, *, base, weights, …options) -> state`, `weights` by key. It
        takes those keywords that it needs, and may ask for more: `seed`; `depth`, the place of the
        tensor's layer from 0 (input) to 1 (output), `depths` by key for a model;
        `report`, a dict that it may fill with JSON values and that `zoo.fuse` puts into the recipe;
        and what `uses` and `can_use` name. Pure: it changes no input, moves nothing, and draws
        random numbers from seed, key and offset alone, so that no result depends on order, threads
        or cuts. With scope `"model"` the states are whole, running statistics and integers
        included; the result has at least the keys of `weights`, and running statistics in it are
        taken as they are.
    features: `(dims, *, …options) -> nn.Module` with `out_features` D, from a list with what each
        member gives (see `takes`) to [B, D].
    outputs: `(members, num_classes, *, …options) -> nn.Module`, `forward(logits [M, B, C],
        features=None) -> log-probabilities [B, C]`. One that learns has `fit(logits, labels)`
        and a buffer `fitted`, says `uses={"data", "labels"}`, and is fitted once, by
        `fuse(…, data=)`; what `fit` gives, a mapping of JSON values or None, goes into the recipe.
        With an attribute `wants_features = True` both are given the members' pooled features, one
        [B, Dᵢ] of each: `fit(logits, labels, features=…)`. A builder may take `dims`, the list of
        the Dᵢ, and `known`, bool [members, num_classes]: which classes a member knows. What it
        does not know is filled in before, and `logits` are log-probabilities then.
    choice: `(models, *, data, base, device, seed, …options) -> Model`: it tries fusions of the
        other kinds on labelled data and gives the best, or the best member. It says
        `uses={"data", "labels"}`.

    Options are keyword-only arguments with JSON values and a default, each described in one line
    `name: text` under `Options:` in the docstring. Of a fusion of weights that does not see the
    whole model, users may give numbers and truth values by tensor, like weights, and a builder gets
    that of its tensor; an option of the type `zoo.options.PerMember` may differ between members
    too, and a builder gets it as a tuple, one number per member.

    kind: `"weights"`, `"features"`, `"outputs"` or `"choice"`.
    members: fewest and most (None: no limit).
    uses: what the core must be given to pass on; without it the fusion is refused.
    can_use: what it passes on where there is some, else None. Both name keywords of a fusion of
        weights:
        base: the tensor, slice or state that the members started from.
        module: the network, a private copy in evaluation mode; its keys are the states'.
        data: batches [B, C, H, W] as `module` takes them; may be iterated again and again.
        labels: their labels, int64 [B], in the same order: `zip(data, labels)`.
        graph: which axes of which tensors may be permuted together, `zoo.fusion.align.Graph`.
        score: `score(state) -> float`, on held-out data, higher is better.
        Of a fusion of outputs, `uses={"data", "labels"}` says that it has `fit`.
    symmetric: the order of the members does not matter.
    idempotent: fusing k copies of a model gives it back.
    scope: (weights) what one call sees, `"slice"`, `"rows"`, `"tensor"` or `"model"`; a mapping
        `{option: {value: scope}}` where it depends on an option.
    measure: (weights) `"module:attribute"` of a function with the arguments of `build`, for what
        the strategy must know first of more than it sees at once. It is called for every tensor
        or slice, and its answers (numbers, small tensors, or what else `+` adds) are added up.
        `measured`, which both functions may take, is the tuple of the sums so far, one per pass. A
        new pass begins until it answers None, at most ten times.
    measured_over: (weights) over what the answers are added up: the `"model"`, or each `"tensor"`
        for itself; or a mapping, as with scope, in which `"nothing"` says that `measure` is not
        wanted.
    elementwise: (weights) with scope `"slice"`: an entry of the result depends on that entry of the
        members, their weights, the options and `measured` alone, and what is measured over the
        model not on the cuts. Small tensors of equal weights and options then come joined, under
        the key of the first.
    takes: (features) `"vectors"` [B, Dᵢ], `"tokens"` [B, Nᵢ, Dᵢ], or `"maps"` [B, Dᵢ, H, W], on
        one grid for all.
    """

    kind_name: ClassVar[str] = "fusion"

    kind: str
    members: tuple[int, int | None] = (2, None)
    uses: frozenset[str] = frozenset()
    symmetric: bool = False
    idempotent: bool = False
    scope: str | Mapping[str, Mapping[str, str]] = "tensor"
    measure: str = ""
    measured_over: str | Mapping[str, Mapping[str, str]] = "model"
    elementwise: bool = False
    can_use: frozenset[str] = frozenset()
    takes: str = "vectors"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._want(self.kind in KINDS, "kind", " or ".join(map(repr, KINDS)))
        self._freeze("members", tuple)
        fewest, most = (*self.members, None, None)[:2]
        self._want(len(self.members) == 2 and isinstance(fewest, int) and fewest >= 1
                   and (most is None or (isinstance(most, int) and most >= fewest)),
                   "members", "(fewest, most or None)")
        self._freeze("uses", frozenset)
        self._freeze("can_use", frozenset)
        for field in ("uses", "can_use"):
            self._want(getattr(self, field) <= FUSION_USES, field,
                       f"a subset of {sorted(FUSION_USES)}")
        self._check_reach("scope", SCOPES)
        self._check_reach("measured_over", MEASURED_OVER)
        self._want(self.measure == "" or (isinstance(self.measure, str)
                                          and bool(_BUILD.fullmatch(self.measure))),
                   "measure", "'module:attribute' or ''")
        self._want(self.takes in TAKES, "takes", " or ".join(map(repr, TAKES)))

    def _check_reach(self, field: str, allowed: tuple[str, ...]) -> None:
        """One of the allowed words, or which of them for each value of an option."""
        value = getattr(self, field)
        expected = f"{' or '.join(map(repr, allowed))}, or {{option: {{value: one of these}}}}"
        if isinstance(value, str):
            self._want(value in allowed, field, expected)
            return
        self._want(
            isinstance(value, Mapping) and bool(value) and all(
                isinstance(values, Mapping) and all(reach in allowed for reach in values.values())
                for values in value.values()), field, expected)
        object.__setattr__(self, field, MappingProxyType(
            {option: MappingProxyType(dict(values)) for option, values in value.items()}))


def reach(
    declared: str | Mapping[str, Mapping[str, str]], options: Mapping[str, Any],
    order: Sequence[str],
) -> str:
    """The scope, or what is measured over, with these options; where several have a say, the last
    in this order."""
    if isinstance(declared, str):
        return declared
    return max((values[str(options[option])] for option, values in declared.items()),
               key=order.index)


@dataclass(frozen=True, kw_only=True)
class TransferSpec(Spec):
    """A way of training a model: `build(model, *, criterion, …options)` gives a
    `zoo.transfers.objective.Objective`, which says what trains and what the loss of a batch is,
    or a sequence of `Phase`, for a method in several parts. Options as in FusionSpec.

    family: `"traditional"`, `"adversarial-transfer"`, `"adversarial-training"` or
        `"distillation"`.
    uses: what the method learns from beside labelled images: `"unlabelled"` puts target images
        into every batch and must be given; `"teachers"` allows frozen models, whose embeddings and
        logits come with every batch, and which the builder gets as the keyword `teachers` if it
        takes it.
    without_labels: options with which it learns from images without labels (`{"alpha": 1.0}`): all
        labels of a batch are then -1. Without it such images are refused.
    """

    kind_name: ClassVar[str] = "transfer"

    family: str = "traditional"
    uses: frozenset[str] = frozenset()
    without_labels: Mapping[str, object] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._want(isinstance(self.without_labels, Mapping) and all(
            isinstance(option, str) for option in self.without_labels),
            "without_labels", "options and their values")
        object.__setattr__(self, "without_labels", MappingProxyType(dict(self.without_labels)))
        self._want(self.family in FAMILIES, "family", " or ".join(map(repr, FAMILIES)))
        self._freeze("uses", frozenset)
        self._want(self.uses <= TRANSFER_USES, "uses", f"a subset of {sorted(TRANSFER_USES)}")


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Spec):
    """A data set: `build(*, split, …options) -> torch.utils.data.Dataset`.

    Items are (image, label): a PIL image, or a uint8 [C, H, W] tensor on 0…255, or a float one
    on [0, 1]; and an int. The data set has `classes`, the names that the labels count.
    splits: what `split` may be; the first is trained on, the last is the test set.
    """

    kind_name: ClassVar[str] = "dataset"

    splits: tuple[str, ...] = ("train", "test")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._freeze("splits", tuple)
        self._want(bool(self.splits) and all(isinstance(split, str) for split in self.splits),
                   "splits", "at least one name")


AnySpec = BackboneSpec | FusionSpec | TransferSpec | DatasetSpec


@runtime_checkable
class Catalog(Protocol):
    """A namespace too large to list in one go; names are local (`resnet18`), without namespace."""

    def find(self, name: str) -> AnySpec | None:
        """The spec of exactly this name, or None."""

    def search(self, pattern: str) -> Iterable[str]:
        """All names that match a shell-style pattern (`resnet*`)."""


def described(spec: AnySpec) -> dict[str, object]:
    """The spec as plain JSON values."""
    plain: dict[str, object] = {"type": spec.kind_name}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, frozenset):
            value = sorted(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {name: dict(inner) if isinstance(inner, Mapping) else inner
                     for name, inner in value.items()}
        plain[field.name] = value
    return plain
