"""Several models in, one model out."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from zoo.assembly.given import Norms, can_repair, opened
from zoo.assembly.layers import Layer, Pool, choices_of
from zoo.assembly.members import (
    asked_classes,
    base_of,
    check_models,
    fetch_members,
    is_name,
    model_of,
    want_members,
)
from zoo.assembly.one_network import fuse_weights, settle_norms
from zoo.assembly.resizing import at_one_size
from zoo.assembly.searching import read_search, search_weights
from zoo.assembly.side_by_side import fit_outputs, put_side_by_side
from zoo.building import seeded
from zoo.device import resolve_device, resolve_dtype
from zoo.errors import OptionError
from zoo.fusion.planning import check_count
from zoo.fusion.weighting import Weight
from zoo.model import Model
from zoo.options import checked, options_of
from zoo.registry import find, load
from zoo.specs import FusionSpec


def fuse(
    members: Sequence[Model | str | Path],
    strategy: str,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    base: Model | str | Path | None = None,
    data: Any = None,
    weight: Weight | None = None,
    norms: Norms = "auto",
    search: Mapping[str, Any] | None = None,
    layer: Layer | None = None,
    pool: Pool | None = None,
    pretrained: bool = True,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Make one model of several, in evaluation mode. The members are copied and never changed.

    members: models, names (with pretrained weights, unless pretrained=False), paths or addresses.
    strategy: by name; `zoo.list_fusions()` lists them. A fusion of weights gives one network of
        the members' architecture, with one classifier for all their labels, at the first one's
        image size (position embeddings of other sizes are resampled); of features, one with
        a fresh head for num_classes or classes (by default the members' common ones), to be
        trained by `zoo.transfer`; of outputs, one that joins answers, over all classes that any
        member knows, fitted on `data` where the strategy learns. `"auto"` tries them on `data` and
        gives the best, trained and fitted.
    base: the model that the members started from, for strategies that work on differences; found
        by itself where all members have the same pretrained weights in their provenance.
    data: labelled images that nothing was trained on and no test will use, for strategies that
        learn and for `norms`; others leave it alone.
    weight: for a fusion of weights: a number per member, or `{pattern: number(s)}` over tensors.
    norms: of activations after a fusion of weights: batch norm's running statistics `"pooled"`
        over the members or `"reestimated"` on data; `"repair"` gives each channel the mean and
        the deviation again that it has in the members, on data, without batch norm too; or
        whichever is best on a held-out part of the data (auto).
    search: for a fusion of weights: options whose values are to be found on `data`, each with a
        list to try or a range to search: `{"density": [0.1, 0.2], "scale": "0.3..1.5"}` (or
        `(0.3, 1.5)`). The best member is a candidate too and wins where it is better; the recipe
        has all candidates with their scores.
    layer: for a fusion of features: the layer whose output the members give, by its module's name
        (`"layer3"`), or a list with an entry for each: a name, None for what comes before the
        network's own pooling, or a list of names, whose outputs are put side by side.
    pool: for a fusion of features: how a member's output becomes one vector, for all or a list:
        `"avg"`, `"max"`, `"avgmax"`, `"gem"`, `"cls"` (the class token), None for the usual way.
    image_size: of the members that are names. device: by default that of the first member that is
        a model. seed: of all random numbers, apart from torch's own generator. options: the
        strategy's own.

    Raises FusionError, which says why not and what would work instead; UnknownName; OptionError.
    """
    spec = find(strategy, FusionSpec)
    space = None if search is None else read_search(spec, search, options,
                                                    has_data=data is not None)
    values = checked(spec, options) if space is None else {}
    want_members(spec.name, members, base)
    _check_arguments(spec, members, base, weight, norms, image_size)
    if norms == "repair":
        options = _repairing(spec, len(members), options, search or {}, has_data=data is not None)
        values = checked(spec, options) if space is None else {}
    names = asked_classes(spec.name, num_classes, classes)
    if names is not None and spec.kind == "choice":
        raise OptionError(spec.name, "its classes are those of the data; leave num_classes and "
                          "classes out")
    choices = choices_of(spec, len(members), layer, pool)
    resolve_dtype(dtype)  # a misspelling is found before any work
    given = [member for member in members if isinstance(member, Model)]
    where = given[0].device if given and device is None else resolve_device(device)
    with seeded(seed):
        fetched = fetch_members([*members, base])
        models = [model_of(member, pretrained, image_size, fetched) for member in members]
        if base is None and "base" in spec.uses:
            base = base_of(models)
        started_from = None if base is None else model_of(base, pretrained, image_size, fetched)
        alike, start = models, started_from
        if spec.kind == "weights":
            alike, start = _at_one_size(models, started_from)
        check_models(spec, members, alike, base, start, has_data=data is not None)
        if spec.kind == "choice":
            best: Model = load(spec)(models, data=data, base=started_from, device=where, seed=seed,
                                     **values)
            return best.to(where, None if dtype is None else resolve_dtype(dtype))
        chosen = _class_names(spec, models, names, counted=classes is None)
        report: dict[str, Any] = {}
        told: dict[str, Any] = {}
        looked_at: dict[str, Any] = {}
        if space is not None:
            found = search_weights(spec, alike, start, weight, options, space, seed=seed,
                                   device=where, data=data, norms=norms, alone=models)
            fused, values, report, told = found.model, found.options, found.report, found.told
        elif spec.kind == "weights":
            images = opened(spec, alike, chosen, data, norms)
            fused, report, kept = fuse_weights(spec, alike, start, weight, values, seed=seed,
                                               device=where, images=images, norms=norms)
            settle_norms(fused, norms, images, kept)
            looked_at = images.told() if images is not None else {}
        else:
            with seeded(seed):  # a new head is the same, however many members were built before
                fused = put_side_by_side(spec, models, chosen, values, choices)
        fused.recipe = _recipe(spec, values, seed, models, started_from, weight)
        if spec.kind == "features":
            fused.recipe["classes"] = list(chosen)  # a transfer may change the model's
        facts: dict[str, Any] = {
            "report": report, "search": told, "layer": layer, "pool": pool, "looked_at": looked_at,
            "asked_norms": "" if norms == "auto" else norms,
            "dtype": "" if dtype is None else str(resolve_dtype(dtype)).removeprefix("torch."),
            "device": "" if where.type == "cpu" else where.type}
        fused.recipe |= {name: fact for name, fact in facts.items() if fact}
        fused.to(where)
        if hasattr(fused.fuser, "fit") and data is not None:
            fit_outputs(fused, data)
    return fused.to(dtype=resolve_dtype(dtype)) if dtype is not None else fused


def _at_one_size(
    models: Sequence[Model], base: Model | None
) -> tuple[list[Model], Model | None]:
    """The members and the base as they look at images of the first member's size."""
    given = [*models, *([] if base is None else [base])]
    alike = at_one_size(given)
    names = [*(f"member {number}" for number in range(1, len(models) + 1)), "the base"]
    for name, one, other in zip(names, given, alike, strict=False):
        if one is not other:
            warnings.warn(f"{name} looks at {one.image_size} × {one.image_size} pixels; its "
                          f"position embeddings were resampled to the first member's "
                          f"{other.image_size} × {other.image_size}", stacklevel=3)
    return alike[:len(models)], None if base is None else alike[-1]


def _check_arguments(
    spec: FusionSpec, members: Sequence[object], base: object, weight: object, norms: str,
    image_size: int | None,
) -> None:
    check_count(spec, len(members))
    if base is not None and "base" not in spec.uses | spec.can_use:
        raise OptionError(spec.name, "it does not use a base; leave base= out")
    if spec.kind != "weights":
        if weight is not None:
            raise OptionError(spec.name, "weight belongs to fusions of weights; leave it out")
        if norms != "auto":
            raise OptionError(spec.name, "norms belongs to fusions of weights; leave it out")
    if norms not in get_args(Norms):
        raise OptionError("fuse", f"norms is {norms!r}, expected {' or '.join(get_args(Norms))}")
    if image_size is not None and not any(is_name(member) for member in (*members, base)):
        raise OptionError(spec.name, "image_size is for members that are names, and none is; "
                          "leave it out")


def _repairing(
    spec: FusionSpec, members: int, options: Mapping[str, Any], search: Collection[str], *,
    has_data: bool,
) -> dict[str, Any]:
    """The options for norms="repair": of a strategy that moves units and repairs by itself, with
    its own. Raises OptionError where nothing can be repaired."""
    if any(option.name == "repair" and option.type == "bool" for option in options_of(spec)):
        if options.get("repair") is False:
            raise OptionError(spec.name, "norms is 'repair' and the option 'repair' is false; "
                              "choose one")
        options = {**({} if "repair" in search else {"repair": True}), **options}
    elif not can_repair(spec, members):
        why = ("needs two members or more" if members < 2 else
               f"needs members that stay as they are, and {spec.name} moves their units"
               if "graph" in spec.uses else
               f"needs members with known shares, and {spec.name} chooses by itself who is in it")
        raise OptionError("fuse", f"norms='repair' {why}; 'reestimated' and 'auto' do without")
    if not has_data:
        raise OptionError("fuse", "norms='repair' needs images; pass data=")
    return dict(options)


def _class_names(
    spec: FusionSpec, models: Sequence[Model], asked: tuple[str, ...] | None, *, counted: bool
) -> tuple[str, ...]:
    """The classes of the fused model: those that are asked for, for a new head; else the members'
    own. counted: only their number was asked for."""
    every = tuple(dict.fromkeys(name for model in models for name in model.classes))
    same = all(len(model.classes) == len(every) for model in models)
    common = every if spec.kind == "outputs" else models[0].classes
    fits = asked is None or asked == common or (counted and len(asked) == len(common))
    if spec.kind != "features":
        if spec.kind == "weights" and not same and asked is None:
            return every
        if not fits:
            raise OptionError(spec.name, "the members keep their heads, for "
                              f"{len(common)} classes in the order of the first one's; leave "
                              "num_classes and classes out, or fuse features to get a new head")
        return common
    if asked is None and not same:
        raise OptionError(spec.name, "the members have different classes; pass num_classes= or "
                          "classes= for the new head")
    return common if asked is None or (same and fits) else asked


def _recipe(
    spec: FusionSpec, values: Mapping[str, Any], seed: int, models: Sequence[Model],
    base: Model | None = None, weight: Weight | None = None,
) -> dict[str, Any]:
    """Where a fused model comes from, as JSON values."""
    def told(model: Model) -> dict[str, Any]:
        resized = spec.kind == "weights" and model.image_size != models[0].image_size
        return model.told(apart=resized)

    recipe: dict[str, Any] = {
        "strategy": spec.name, "kind": spec.kind, "options": dict(values), "seed": seed,
        "sources": [told(model) for model in models],
    }
    if weight is not None:
        recipe["weight"] = weight
    if base is not None:
        recipe["base"] = told(base)
    return recipe
