"""A recipe tried out before any work: names and options are looked up, contradictions found, and
every step is done once with networks of a few weights on a few images, which takes no time and
meets the same checks of the same values."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from zoo.assembly import backbone, fuse
from zoo.assembly.layers import choices_of
from zoo.attacks import resolve_attack
from zoo.backbones.layers import want_layers
from zoo.building import build_net, without_weights
from zoo.datasets import ImageData
from zoo.errors import BadName, FusionError, OptionError, PluginError, UnknownName, ZooError
from zoo.fusion.planning import check_count
from zoo.fusion.weighting import resolve_options, resolve_weights
from zoo.merge_files.documents import Place, Problem
from zoo.model import Model
from zoo.names import Name, is_path, parse, suggest
from zoo.options import by_member, by_tensor, checked, options_of
from zoo.pipeline.recipes import (
    SOURCE,
    TARGET,
    Backbone,
    Everything,
    Fuse,
    Recipe,
    Transfer,
    known_fields,
)
from zoo.registry import find, load
from zoo.specs import AnySpec, BackboneSpec, FusionSpec, TransferSpec
from zoo.training import transfer

S = TypeVar("S", bound=AnySpec)


def dry_run(recipe: Recipe) -> None:
    """Raise RecipeError with everything that is found wrong, each with its line and field."""
    problems = [*_wrong_names(recipe)]
    if not problems:
        problems = [*_contradictions(recipe), *_wrong_values(recipe)]
    if problems:
        raise recipe.error(problems)
    if recipe.data.target.unlabelled and not list(_adapting(recipe)):
        warnings.warn("no step of this recipe learns from data.target.unlabelled; a method such "
                      "as 'dann' does", stacklevel=3)


def same_network(recipe: Recipe) -> bool:
    """Whether the target is of the source's architecture, so that weights go from one to the
    other."""
    source, target = recipe.source, recipe.target
    specs = [_look_up(recipe, part.backbone, BackboneSpec) for part in (source, target)]
    one, other = (spec.name if spec else part.backbone
                  for spec, part in zip(specs, (source, target), strict=True))
    return (one == other and source.options == target.options
            and target.image_size in (None, source.image_size))


def _transfers(recipe: Recipe) -> Iterator[tuple[Place, Transfer]]:
    """Every transfer that is written in a recipe, and where."""
    parts = [((step,), getattr(recipe, step)) for step in ("source", "target")]
    for place, part in [*parts, *recipe.fuse.fusions(("fuse",)), (("everything",),
                                                                  recipe.everything)]:
        if part.transfer is not None:
            yield (*place, "transfer"), part.transfer
    if recipe.update:
        yield ("update",), recipe.update


def _adapting(recipe: Recipe) -> Iterator[tuple[Place, Transfer]]:
    """The transfers that learn from unlabelled images."""
    for place, method in _transfers(recipe):
        if "unlabelled" in find(method.method, TransferSpec).uses:
            yield place, method


def _wrong_names(recipe: Recipe) -> Iterator[Problem]:
    for step in ("source", "target", "everything"):
        part: Backbone | Everything = getattr(recipe, step)
        if part.backbone is None:
            yield from _unknown_options((step,), "a baseline without 'backbone'", part.options, ())
        else:
            yield from _wrong(recipe, (step, "backbone"), part.backbone, BackboneSpec, part.options)
    for place, fusion in recipe.fuse.fusions(("fuse",)):
        yield from _wrong(recipe, (*place, "strategy"), fusion.strategy, FusionSpec,
                          fusion.options)
        for inner, other in fusion.others:
            yield from _wrong_model(recipe, (*place, *inner), other)
    for place, method in _transfers(recipe):
        yield from _wrong(recipe, (*place, "method"), method.method, TransferSpec, method.options)
    for name, options in recipe.evaluate.attacks.items():
        try:
            resolve_attack(name, options)
        except (UnknownName, OptionError) as error:
            yield _blamed(("evaluate", "attacks", name), error, options)


def _look_up(recipe: Recipe, name: str, kind: type[S]) -> S | None:
    """The spec of a name; None for a network that is a path or an address."""
    if kind is BackboneSpec and not isinstance(parse(recipe.model_place(name)), Name):
        return None
    return find(name, kind)


def _wrong(
    recipe: Recipe, place: Place, name: str, kind: type[S], options: Mapping[str, Any]
) -> Iterator[Problem]:
    """A name that nothing is registered under, and options that it does not have or not so."""
    try:
        spec = _look_up(recipe, name, kind)
    except (BadName, UnknownName, PluginError) as error:
        yield place, str(error)
        return
    around = place[:-1]
    if spec is None:
        yield from _unknown_options(around, "a saved model", options, ())
        return
    known = [option.name for option in options_of(spec)]
    yield from _unknown_options(around, spec.name, options, known)
    given = {option: value for option, value in options.items() if option in known}
    complaint = _complaint(around, spec, given)
    while complaint:
        yield complaint
        if complaint[0] == around:
            return
        del given[complaint[0][-1]]
        complaint = _complaint(around, spec, given)


def _wrong_model(recipe: Recipe, place: Place, given: str) -> Iterator[Problem]:
    """A model that is no part of the recipe, and is none elsewhere either."""
    near = suggest(given, (SOURCE, TARGET), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    try:
        spec = _look_up(recipe, given, BackboneSpec)
    except (BadName, UnknownName, PluginError) as error:
        yield place, f"{error}{hint}"
        return
    path = recipe.model_place(given).removeprefix("local-dir:")
    if spec is None and is_path(path) and not Path(path).exists():
        yield place, f"there is no file or folder {path}{hint}"


def _complaint(place: Place, spec: AnySpec, given: Mapping[str, Any]) -> Problem | None:
    try:
        checked(spec, given)
    except OptionError as error:
        return _blamed(place, error, given)
    return None


def _unknown_options(
    place: Place, owner: str, options: Iterable[str], known: Sequence[str]
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
        spec = _look_up(recipe, part.backbone, BackboneSpec) if part.backbone else None
        if spec and part.pretrained and not spec.weights:
            yield ((step, "pretrained"), f"{spec.name} has no published weights; write "
                   "'pretrained: false'")
    for place, fusion in recipe.fuse.fusions(("fuse",)):
        yield from _contradicted(recipe, place, fusion)
    if recipe.data.target.unlabelled is None:
        for place, method in _adapting(recipe):
            yield ((*place, "method"), f"{method.method} adapts to unlabelled images; say where "
                   "they are in data.target.unlabelled")


def _contradicted(recipe: Recipe, place: Place, part: Fuse) -> Iterator[Problem]:
    """What is right in each place of a fusion and cannot be done together."""
    fusion = find(part.strategy, FusionSpec)
    if part.members is None and fusion.members[0] > 2:
        yield (*place, "strategy"), (
            f"{fusion.name} takes {fusion.members[0]} members or more, and a recipe has two, "
            "source and target; list more as 'members'")
    elif part.members is not None and not part.takes_base_first(fusion):
        try:
            check_count(fusion, len(part.members))
        except FusionError as error:
            yield (*place, "members"), str(error)
    if part.base is not None and "base" not in fusion.uses | fusion.can_use:
        yield (*place, "base"), f"{fusion.name} does not use a base; leave it out"
    if fusion.kind == "choice" and part.transfer:
        yield (*place, "transfer"), f"{fusion.name} trains what it chooses; leave it out"
    if fusion.kind != "weights":
        for name in ("weight", "norms"):
            if getattr(part, name) is not None:
                yield (*place, name), f"{fusion.name} fuses no weights; leave it out"
        return
    for inner, each in part.ingredients:
        kind = find(each.strategy, FusionSpec).kind if isinstance(each, Fuse) else "weights"
        if kind != "weights":
            yield (*place, *inner), (f"{fusion.name} fuses weights, and this is a fusion of "
                                     f"{kind}, which is several networks")
    used = {each for _, fused in part.fusions(()) for _, each in fused.ingredients
            if isinstance(each, str)}
    if {SOURCE, TARGET} <= used and not same_network(recipe):
        yield (*place, "strategy"), (
            f"{fusion.name} fuses weights, and the source ({recipe.source.backbone}) and the "
            f"target ({recipe.target.backbone}) are not one network with the same options; "
            "'concat' and 'weighted' fuse any two")


def _wrong_values(recipe: Recipe) -> Iterator[Problem]:
    """What the strategies themselves say against their options."""
    for step, part in (("source", recipe.source), ("target", recipe.target),
                       ("everything", recipe.baseline)):
        written = [*part.options, *(["image_size"] if part.image_size else [])]
        if step != "everything" or recipe.everything.backbone:
            yield from _tried((step,), written, partial(_build, recipe, part))
    for place, fusion in recipe.fuse.fusions(("fuse",)):
        yield from _tried(place, fusion.arguments, partial(_fuse, recipe, fusion))
    taught = {"target": bool(recipe.target.start), "update": True}
    wrong = set()
    for place, method in _transfers(recipe):
        attempt = partial(_train, recipe, method, taught=taught.get(place[0], False))
        for problem in _tried(place, method.arguments, attempt):
            wrong.add(place[0])
            yield problem
    if not recipe.everything.transfer and "target" not in wrong:
        attempt = partial(_train, recipe, recipe.baseline.transfer, taught=False)
        for _, complaint in _tried((), (), attempt):
            yield ("everything",), f"as a baseline, which has no teacher: {complaint}"


def _build(recipe: Recipe, part: Backbone) -> nn.Module | None:
    spec = _look_up(recipe, part.backbone, BackboneSpec)
    if spec is None:
        return None
    options = checked(spec, part.options)
    return without_weights(lambda: build_net(spec, num_classes=2, pretrained=False, in_chans=3,
                                             image_size=part.image_size, options=options))


def _fuse(recipe: Recipe, part: Fuse) -> None:
    spec = find(part.strategy, FusionSpec)
    given = part.members or [SOURCE, TARGET]
    members = [_network(seed) for seed in range(min(len(given), spec.members[1] or len(given)))]
    parts: dict[str, Backbone] = {SOURCE: recipe.source, TARGET: recipe.target}
    for each, (layers, _) in zip(given, choices_of(spec, len(given), part.layer, part.pool),
                                 strict=True):
        own = parts.get(each) if isinstance(each, str) else None
        net = _build(recipe, own) if layers and own else None
        if net is not None and own is not None:
            want_layers(net, own.backbone, layers)
    if spec.kind == "weights" and spec.members[0] <= len(given) == len(members):
        _want_values(spec, part, len(given))
    # These networks have other layers and tensors.
    arguments = {name: value for name, value in part.arguments.items() if name not in
                 ("weight", *part.options) or "{" not in str(value)} | {"layer": None}
    fuse(members, spec.name, base=_network(len(given)) if "base" in spec.uses else None,
         data=_images(), **arguments)


def _want_values(spec: FusionSpec, part: Fuse, members: int) -> None:
    """Look at what is told by patterns of tensors: each value as if it were for all of them."""
    key = ("any",)
    for weight in _everywhere(part.weight):
        resolve_weights(weight, key, members, spec.name)
    strategy = load(spec)
    varying = by_member(spec, strategy) | by_tensor(spec, strategy)
    for name, value in part.options.items():
        for each in _everywhere(value) if name in varying else ():
            options = checked(spec, {**part.options, name: each})
            resolve_options(spec, strategy, {name: options[name]}, key, members)


def _everywhere(value: Any) -> list[Any]:
    """A weight or option once for each of its patterns, which is then `*`."""
    if isinstance(value, Mapping):
        return [{"*" if isinstance(pattern, str) else pattern: each}
                for pattern, each in value.items()] or [value]
    if not isinstance(value, list):
        return [value]
    columns = [_everywhere(each) for each in value]
    return [[column[min(number, len(column) - 1)] for column in columns]
            for number in range(max(map(len, columns), default=1))]


def _train(recipe: Recipe, method: Transfer, *, taught: bool) -> None:
    uses = find(method.method, TransferSpec).uses
    transfer(_network(0), _images(), method.method, val=_images(),
             unlabelled=_images() if "unlabelled" in uses else None,
             teachers=[_network(1)] if taught and "teachers" in uses else (),
             **{**method.arguments, "epochs": 2, "workers": 0})


def _network(seed: int) -> Model:
    return backbone("zoo/mnist_cnn", num_classes=2, image_size=8, device="cpu", seed=seed)


def _images() -> ImageData:
    pixels = torch.arange(4 * 64).remainder(251).to(torch.uint8)
    return ImageData(pixels.view(4, 1, 8, 8), [0, 1, 0, 1])


def _tried(
    place: Place, given: Iterable[str], attempt: Callable[[], object]
) -> Iterator[Problem]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt()
    except (OptionError, UnknownName, BadName) as error:
        yield _blamed(place, error, given)
    except Exception:  # what these networks cannot do, the real ones may
        return


def _blamed(place: Place, error: ZooError, given: Iterable[str]) -> Problem:
    """A complaint, at the first of the given fields that it mentions."""
    problem = getattr(error, "problem", "") or str(error)
    found = {name: match.start() for name in given
             if (match := re.search(rf"\b{re.escape(name)}\b", problem))}
    return (*place, *sorted(found, key=found.__getitem__)[:1]), str(error)
