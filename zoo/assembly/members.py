"""Names in, models out: a network by name, and the members of a fusion, checked."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.assembly.one_network import want_single
from zoo.assembly.resizing import resize
from zoo.backbones.activations import swap_activations
from zoo.backbones.semantics import classifier_keys
from zoo.blueprints import Blueprint
from zoo.building import build_net, member_of, seeded
from zoo.device import resolve_device, resolve_dtype
from zoo.errors import BadName, FusionError, OptionError, UnknownName
from zoo.fusion.planning import MemberFacts, check
from zoo.model import Model
from zoo.names import Address, Name, is_path, parse
from zoo.options import checked
from zoo.registry import find
from zoo.specs import BackboneSpec, FusionSpec
from zoo.store import load as load_model
from zoo.store import load_fetched, network
from zoo.store.fetching import Fetched, hub_folders


def backbone(
    name: str | Path,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    pretrained: bool = False,
    in_chans: int = 3,
    image_size: int | None = None,
    activation: str | None = None,
    device: str | torch.device | None = "auto",
    dtype: str | torch.dtype | None = None,
    seed: int | None = None,
    **options: Any,
) -> Model:
    """Build one network as a Model, in evaluation mode.

    name: registered (`timm/resnet18`, `lite/efficientnet_lite0`, `mnist_cnn`), an address
        (`hf-hub:org/name@rev`, `local-dir:path`) or a path; the last three always have weights.
    num_classes, classes: a fresh head for this many classes, or for these names; by default the
        pretrained head stays. pretrained: the published weights; when they cannot be had it is an
        error. in_chans: channels that the network takes. image_size: side of the square it looks
        at, by default the size it was trained at. activation: put this one in place of every
        other. seed: of the random weights, apart from torch's own generator. options: the
        builder's own.

    Raises UnknownName with the nearest spellings, WeightsError, OptionError, DeviceError.
    """
    where = resolve_device(device)
    names = asked_classes(str(name), num_classes, classes)
    reference = _reference(name)
    with seeded(seed):
        if isinstance(reference, Name):
            model = _registered(str(name), num_classes if names is None else len(names), classes,
                                pretrained, in_chans, image_size, activation, options)
            if not pretrained and seed is not None:
                model.recipe["fresh"] = {"seed": seed, "classes": list(model.classes)} | (
                    {"dtype": str(resolve_dtype(dtype)).removeprefix("torch.")} if dtype else {})
        else:
            model = load_model(reference, device="cpu")
            _want_none(name, in_chans=None if in_chans == 3 else in_chans, **options)
            if image_size is not None:
                resize(model, image_size, str(name))
            if activation:
                model.set_activation(activation)
            if names is not None and names != model.classes:
                model.reset_classes(names)
    return model.eval().to(where, resolve_dtype(dtype) if dtype is not None else None)


def check_models(
    spec: FusionSpec, given: Sequence[Model | str | Path], models: Sequence[Model],
    base_given: Model | str | Path | None, base: Model | None, *, has_data: bool,
) -> None:
    names = distinct([spelled(member) for member in given])
    if spec.kind == "weights":
        want_single(spec, names, models)
    check(spec, [facts(model, name) for model, name in zip(models, names, strict=True)],
          has_base=base is not None, has_data=has_data or spec.kind == "outputs")
    if base is None or base_given is None:
        return
    name = f"the base {spelled(base_given)}"
    want_single(spec, [name], [base])
    if architecture(base) != architecture(models[0]):
        raise FusionError(spec.name, f"{name} is {architecture(base)} and the members are "
                          f"{architecture(models[0])}",
                          "Pass the base that the members started from")


def base_of(models: Sequence[Model]) -> Model | None:
    """The pretrained network that all of these were trained from, where their provenance names one.

    Raises WeightsError when it cannot be had any more.
    """
    firsts = [next(model.each_member()) for model in models]
    first = firsts[0]
    told = [{key: value for key, value in member.source.items() if key != "license"}
            for member in firsts]
    built = first.blueprint
    if (not told[0] or built is None or any(model.kind != "single" for model in models)
            or any((member.name, source) != (first.name, told[0])
                   for member, source in zip(firsts, told, strict=True))):
        return None
    try:
        name = parse(first.name)
    except BadName:
        return None
    if not isinstance(name, Name) or built.config is not None:
        return None
    return backbone(first.name, pretrained=True, in_chans=built.in_chans, device="cpu",
                    image_size=built.image_size, activation=built.activation, **built.options)


def distinct(names: Sequence[str]) -> list[str]:
    """The names; those that occur twice with the member's number."""
    seen = Counter(names)
    return [f"{name} (member {number})" if seen[name] > 1 else name
            for number, name in enumerate(names, 1)]


def _reference(given: str | Path) -> Name | Address | Path:
    try:
        return parse(given)
    except BadName as error:
        raise UnknownName(str(given), "backbone", hint=error.problem) from None


def _registered(
    given: str, num_classes: int | None, classes: Sequence[str] | None, pretrained: bool,
    in_chans: int, image_size: int | None, activation: str | None, options: Mapping[str, Any],
) -> Model:
    spec = find(given, BackboneSpec)
    values = checked(spec, options)
    if not isinstance(in_chans, int) or in_chans < 1:
        raise OptionError(spec.name, f"in_chans is {in_chans!r}, expected 1 or more")
    net = build_net(spec, num_classes=num_classes, pretrained=pretrained, in_chans=in_chans,
                    image_size=image_size, options=values)
    if activation:
        swap_activations(net, activation)
    outputs = int(getattr(net, "num_classes", 0) or num_classes or 0)
    names = tuple(classes) if classes else _native_classes(net, outputs)
    # A network that was built from a user's file says how to build it without the file.
    blueprint = Blueprint(backbone=spec.name, num_classes=outputs, in_chans=in_chans,
                          image_size=image_size, activation=activation,
                          options=getattr(net, "options", None) or values)
    source = dict(getattr(net, "source", {})) if pretrained else {}
    if pretrained and spec.license:
        source.setdefault("license", spec.license)
    member = member_of(net, spec.name, names, blueprint, source)
    return Model([member], classes=names)


def _native_classes(net: nn.Module, outputs: int) -> tuple[str, ...]:
    names = getattr(net, "label_names", None)
    if names and len(names) == outputs:
        return tuple(names)
    return tuple(map(str, range(outputs)))


def want_members(owner: str, members: object, base: object) -> None:
    """Raises FusionError for what is no list of models, names, paths or addresses, and for a base
    that is none of these."""
    if isinstance(members, (str, os.PathLike, Model)) or not isinstance(members, Sequence):
        raise FusionError(owner, f"the members are {short(members)}, expected a list of models, "
                          "names, paths or addresses")
    named = [(f"member {number}", member) for number, member in enumerate(members, 1)]
    for name, member in [*named, ("the base", base)] if base is not None else named:
        if not isinstance(member, (Model, str, os.PathLike)):
            raise FusionError(owner, f"{name} is {short(member)}, expected a zoo.Model, a name, a "
                              "path or an address")


def fetch_members(given: Iterable[Model | str | Path | None]) -> dict[Address, Fetched]:
    """The repositories of those that are addresses on the Hub, fetched side by side.

    Raises WeightsError of the first that cannot be had.
    """
    named = [each for each in given
             if not isinstance(each, Model) and each is not None and not is_path(each)]
    references = [_reference(each) for each in named]
    return hub_folders(reference for reference in references
                       if isinstance(reference, Address) and reference.scheme == "hf-hub")


def model_of(
    given: Model | str | Path, pretrained: bool, image_size: int | None,
    fetched: Mapping[Address, Fetched],
) -> Model:
    """fetched: what `fetch_members` gave."""
    if isinstance(given, Model):
        return given
    reference = None if is_path(given) else _reference(given)
    if isinstance(reference, Name):
        return backbone(given, pretrained=pretrained, image_size=image_size, device="cpu")
    if isinstance(reference, Address) and reference in fetched:
        return load_fetched(*fetched[reference])
    return load_model(given, device="cpu")


def is_name(given: object) -> bool:
    return isinstance(given, str) and not is_path(given) and isinstance(_reference(given), Name)


def spelled(given: Model | str | Path) -> str:
    return given.name if isinstance(given, Model) else str(given)


def short(given: object) -> str:
    plain = isinstance(given, (str, os.PathLike, int, float))
    return repr(given) if plain else f"a {type(given).__name__}"


def facts(model: Model, name: str) -> MemberFacts:
    state = network(model).state_dict()
    single = model.kind == "single" and not isinstance(network(model), Model)
    heads = frozenset(classifier_keys(network(model)) if single else ())
    return MemberFacts(name=name, architecture=architecture(model), classes=model.classes,
                       shapes={key: tuple(tensor.shape) for key, tensor in state.items()},
                       size=(model.image_size, model.image_size), heads=heads,
                       dtypes={key: str(tensor.dtype) for key, tensor in state.items()})


def architecture(model: Model) -> str:
    member = next(model.each_member())
    if model.kind != "single" or member.blueprint is None:
        return model.name
    built = member.blueprint.backbone.partition(".")[0]
    activation = member.blueprint.activation
    return f"{built} with {activation}" if activation else built


def asked_classes(
    owner: str, num_classes: int | None, classes: Sequence[str] | None
) -> tuple[str, ...] | None:
    """The class names that are asked for: "0", "1", … for a number; None when nothing is."""
    if classes is None:
        if num_classes is None:
            return None
        if not isinstance(num_classes, int) or num_classes < 1:
            raise OptionError(owner, f"num_classes is {num_classes!r}, expected 1 or more")
        return tuple(map(str, range(num_classes)))
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise OptionError(owner, f"classes is {classes!r}, expected a list of names")
    if num_classes not in (None, len(classes)):
        raise OptionError(owner, f"num_classes is {num_classes} and there are {len(classes)} class "
                          "names; give one of the two")
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice or not classes:
        raise OptionError(owner, f"the class {twice[0]!r} stands twice in classes" if twice
                          else "classes is empty, expected at least one name")
    return tuple(classes)


def _want_none(reference: object, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise OptionError(str(reference), f"{name} is fixed by the saved model; leave it out")
