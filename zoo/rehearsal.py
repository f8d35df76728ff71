"""A recipe tried out before any work: names and options are looked up, contradictions found, and
every step is done once with networks of a few weights on a few images, which takes no time and
meets the same checks of the same values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from zoo.assembly import backbone, fuse
from zoo.attacks import resolve_attack
from zoo.building import build_net, without_weights
from zoo.datasets import ImageData
from zoo.errors import BadName, OptionError, PluginError, UnknownName, ZooError
from zoo.names import Name, parse, suggest
from zoo.options import checked, options_of
from zoo.recipes import Backbone, Everything, Place, Problem, Recipe, Transfer, known_fields
from zoo.registry import find
from zoo.specs import AnySpec, BackboneSpec, FusionSpec, TransferSpec
from zoo.training import transfer

S = TypeVar("S", bound=AnySpec)


def rehearse(recipe: Recipe) -> None:
    """Raise RecipeError with everything that is found wrong, each with its line and field."""
    problems = [*_wrong_names(recipe)]
    if not problems:
        problems = [*_contradictions(recipe), *_wrong_values(recipe)]
    if problems:
        raise recipe.error(problems)


def backbone_spec(recipe: Recipe, name: str) -> BackboneSpec | None:
    """The spec of a registered network; None for a path or an address."""
    return find(name, BackboneSpec) if isinstance(parse(recipe.model_place(name)), Name) else None


def same_network(recipe: Recipe) -> bool:
    """Whether the target is of the source's architecture, so that weights go from one to the
    other."""
    source, target = recipe.source, recipe.target
    names = []
    for part in (source, target):
        spec = backbone_spec(recipe, part.backbone)
        names.append(spec.name if spec else part.backbone)
    return (names[0] == names[1] and source.options == target.options
            and target.image_size in (None, source.image_size))


def transfers(recipe: Recipe) -> Iterator[tuple[Place, Transfer]]:
    """Every transfer of a recipe and where it stands."""
    for step in ("source", "target", "fuse", "everything"):
        part = getattr(recipe, step).transfer
        if part is not None:
            yield (step, "transfer"), part
    if recipe.update:
        yield ("update",), recipe.update


def _wrong_names(recipe: Recipe) -> Iterator[Problem]:
    for step in ("source", "target", "everything"):
        part: Backbone | Everything = getattr(recipe, step)
        if part.backbone is None:
            yield from _unknown_options((step,), "without a backbone of its own", part.options, [])
        else:
            yield from _wrong((step, "backbone"), part.options,
                              lambda name=part.backbone: backbone_spec(recipe, name))
    yield from _wrong(("fuse", "strategy"), recipe.fuse.options,
                      lambda: find(recipe.fuse.strategy, FusionSpec))
    for place, method in transfers(recipe):
        yield from _wrong((*place, "method"), method.options,
                          lambda name=method.method: find(name, TransferSpec))
    for name, options in recipe.evaluate.attacks.items():
        try:
            resolve_attack(name, options)
        except (UnknownName, OptionError) as error:
            yield _blamed(("evaluate", "attacks", name), error, options)


def _wrong(
    place: Place, options: Mapping[str, Any], look_up: Callable[[], AnySpec | None]
) -> Iterator[Problem]:
    """A name that nothing is registered under, or options that it does not have or not so."""
    try:
        spec = look_up()
        known = [option.name for option in options_of(spec)] if spec else []
    except (BadName, UnknownName, PluginError) as error:
        yield place, str(error)
        return
    owner = spec.name if spec else "a saved model"
    yield from _unknown_options(place[:-1], owner, options, known)
    given = {name: value for name, value in options.items() if name in known}
    while spec:
        try:
            checked(spec, given)
            return
        except OptionError as error:
            problem = _blamed(place[:-1], error, given)
            yield problem
            if problem[0] == place[:-1]:
                return
            del given[problem[0][-1]]


def _unknown_options(
    place: Place, owner: str, options: Iterable[str], known: list[str]
) -> Iterator[Problem]:
    for name in options:
        if name not in known:
            near = suggest(name, [*known, *known_fields(place)])
            hint = f"did you mean {near[0]!r}?" if near else (
                f"it has {', '.join(known)}" if known else "it has none")
            yield (*place, name), f"{owner} has no such option; {hint}"


def _contradictions(recipe: Recipe) -> Iterator[Problem]:
    """What is right in each place and cannot be done together."""
    for step in ("source", "target", "everything"):
        part: Backbone | Everything = getattr(recipe, step)
        spec = backbone_spec(recipe, part.backbone) if part.backbone else None
        if spec and part.pretrained and not spec.weights:
            yield ((step, "pretrained"), f"{spec.name} has no published weights; write "
                   "'pretrained: false'")
    fusion = find(recipe.fuse.strategy, FusionSpec)
    if fusion.members[0] > 2:
        yield ("fuse", "strategy"), (f"{fusion.name} takes {fusion.members[0]} members or more, "
                                     "and a recipe has two, source and target")
    if fusion.kind == "weights" and not same_network(recipe):
        yield ("fuse", "strategy"), (
            f"{fusion.name} fuses weights, and the source ({recipe.source.backbone}) and the "
            f"target ({recipe.target.backbone}) are not the same network with the same options; "
            "'concat' and 'weighted' fuse any two")
    if fusion.kind != "weights":
        for name in ("weight", "norms"):
            if getattr(recipe.fuse, name) is not None:
                yield ("fuse", name), f"{fusion.name} fuses no weights; leave it out"
    if recipe.data.target.unlabelled is None:
        for place, method in transfers(recipe):
            if "unlabelled" in find(method.method, TransferSpec).uses:
                yield ((*place, "method"), f"{method.method} adapts to unlabelled images; "
                       "say where they are in data.target.unlabelled")


def _wrong_values(recipe: Recipe) -> Iterator[Problem]:
    toys = [backbone("zoo/mnist_cnn", num_classes=2, image_size=8, device="cpu", seed=seed)
            for seed in range(2)]
    few = ImageData(torch.arange(4 * 64, dtype=torch.uint8).view(4, 1, 8, 8), [0, 1, 0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in ("source", "target", "everything"):
            part: Backbone | Everything = getattr(recipe, step)
            spec = backbone_spec(recipe, part.backbone) if part.backbone else None
            if spec:
                yield from _tried((step,), {**part.options, "image_size": part.image_size},
                                  lambda part=part, spec=spec: without_weights(
                                      lambda: build_net(
                                          spec, num_classes=2, pretrained=False, in_chans=3,
                                          image_size=part.image_size,
                                          options=checked(spec, part.options))))
        fusion = find(recipe.fuse.strategy, FusionSpec)
        yield from _tried(("fuse",), {**recipe.fuse.options, "weight": recipe.fuse.weight},
                          lambda: fuse(toys[:fusion.members[1] or 2], fusion.name, base=toys[0],
                                       data=few, weight=recipe.fuse.weight,
                                       **recipe.fuse.options))
        for place, method in transfers(recipe):
            yield from _tried(place, method.arguments,
                              lambda method=method, place=place: _try_transfer(
                                  recipe, place[0], method, toys, few))


def _try_transfer(
    recipe: Recipe, step: str, method: Transfer, toys: list[Any], few: ImageData
) -> None:
    uses = find(method.method, TransferSpec).uses
    taught = step in ("update", "target") and (step == "update" or bool(recipe.target.start))
    transfer(backbone("zoo/mnist_cnn", num_classes=2, image_size=8, device="cpu", seed=0), few,
             method.method, val=few, unlabelled=few if "unlabelled" in uses else None,
             teachers=toys[1:] if taught and "teachers" in uses else (),
             **{**method.arguments, "epochs": 2, "workers": 0})


def _tried(
    place: Place, given: Mapping[str, Any], attempt: Callable[[], object]
) -> Iterator[Problem]:
    try:
        attempt()
    except (OptionError, UnknownName, BadName) as error:
        yield _blamed(place, error, given)
    except ZooError:
        pass  # what a toy cannot do, the real network may


def _blamed(place: Place, error: ZooError, given: Iterable[str]) -> Problem:
    """A complaint, at the first of the given fields that it mentions."""
    problem = getattr(error, "problem", "") or str(error)
    found = {name: match.start() for name in given
             if (match := re.search(rf"\b{re.escape(name)}\b", problem))}
    return (*place, *sorted(found, key=found.__getitem__)[:1]), str(error)
