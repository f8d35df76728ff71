"""Names in, models out: build a network by name, fuse several."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from zoo.assembly.given import Norms
from zoo.assembly.one_network import fuse_weights, settle_norms, want_single
from zoo.assembly.resizing import resize
from zoo.assembly.side_by_side import fit_outputs, put_side_by_side
from zoo.backbones.activations import swap_activations
from zoo.building import build_net, member_of, seeded
from zoo.device import resolve_device, resolve_dtype
from zoo.errors import BadName, FusionError, OptionError, UnknownName
from zoo.fusion.planning import MemberFacts, check, check_count
from zoo.fusion.weighting import Weight
from zoo.model import Blueprint, Model
from zoo.names import Address, Name, is_path, parse
from zoo.options import checked
from zoo.registry import find
from zoo.specs import BackboneSpec, FusionSpec
from zoo.store import load as load_model
from zoo.store import network
from zoo.tensors.digest import digest


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
    names = _asked_classes(str(name), num_classes, classes)
    reference = _reference(name)
    with seeded(seed):
        if isinstance(reference, Name):
            model = _registered(str(name), num_classes if names is None else len(names), classes,
                                pretrained, in_chans, image_size, activation, options)
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
        the members' architecture; of features, one with a fresh head for num_classes or classes
        (by default the members' common ones), to be trained by `zoo.transfer`; of outputs, one
        that averages answers, fitted on `data` where the strategy learns.
    base: the model that the members started from, for strategies that work on differences.
    data: labelled images that nothing was trained on and no test will use, for strategies that
        learn and for `norms`; others leave it alone.
    weight: for a fusion of weights: a number per member, or `{pattern: number(s)}` over tensors.
    norms: running statistics of batch norm after a fusion of weights: `"pooled"` over the members,
        `"reestimated"` on data, or whichever is better on a held-out part of the data (auto).
    image_size: of the members that are names. device: by default that of the first member that is
        a model. seed: of all random numbers, apart from torch's own generator. options: the
        strategy's own.

    Raises FusionError, which says why not and what would work instead; UnknownName; OptionError.
    """
    spec = find(strategy, FusionSpec)
    values = checked(spec, options)
    _check_arguments(spec, members, base, weight, norms, image_size)
    names = _asked_classes(spec.name, num_classes, classes)
    resolve_dtype(dtype)  # a misspelling is found before any work
    given = [member for member in members if isinstance(member, Model)]
    where = given[0].device if given and device is None else resolve_device(device)
    with seeded(seed):
        models = [_model(member, pretrained, image_size) for member in members]
        started_from = None if base is None else _model(base, pretrained, image_size)
        _check_models(spec, members, models, base, started_from, has_data=data is not None)
        chosen = _class_names(spec, models, names, counted=classes is None)
        if spec.kind == "weights":
            fused, report = fuse_weights(spec, models, started_from, weight, values, seed=seed,
                                         device=where, data=data, norms=norms)
        else:
            fused, report = put_side_by_side(spec, models, chosen, values), {}
        fused.recipe = _recipe(spec, values, seed, models, started_from, weight)
        if report:
            fused.recipe["report"] = report
        fused.to(where)
        if spec.kind == "weights":
            settle_norms(fused, norms, data)
        elif hasattr(fused.fuser, "fit") and data is not None:
            fit_outputs(fused, data)
    return fused.to(dtype=resolve_dtype(dtype)) if dtype is not None else fused


def _check_arguments(
    spec: FusionSpec, members: object, base: object, weight: object, norms: str,
    image_size: int | None,
) -> None:
    if isinstance(members, (str, os.PathLike, Model)) or not isinstance(members, Sequence):
        raise FusionError(spec.name, f"the members are {_short(members)}, expected a list of "
                          "models, names, paths or addresses")
    named = [(f"member {number}", member) for number, member in enumerate(members, 1)]
    for name, member in [*named, ("the base", base)] if base is not None else named:
        if not isinstance(member, (Model, str, os.PathLike)):
            raise FusionError(spec.name, f"{name} is {_short(member)}, expected a zoo.Model, a "
                              "name, a path or an address")
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
    if image_size is not None and not any(_is_name(member) for member in (*members, base)):
        raise OptionError(spec.name, "image_size is for members that are names, and none is; "
                          "leave it out")


def _check_models(
    spec: FusionSpec, given: Sequence[Model | str | Path], models: Sequence[Model],
    base_given: Model | str | Path | None, base: Model | None, *, has_data: bool,
) -> None:
    spelled = [_spelled(member) for member in given]
    seen = Counter(spelled)
    names = [f"{name} (member {number})" if seen[name] > 1 else name
             for number, name in enumerate(spelled, 1)]
    if spec.kind == "weights":
        want_single(spec, names, models)
    check(spec, [_facts(model, name) for model, name in zip(models, names, strict=True)],
          has_base=base is not None, has_data=has_data or spec.kind == "outputs")
    if base is None or base_given is None:
        return
    name = f"the base {_spelled(base_given)}"
    want_single(spec, [name], [base])
    if _architecture(base) != _architecture(models[0]):
        raise FusionError(spec.name, f"{name} is {_architecture(base)} and the members are "
                          f"{_architecture(models[0])}",
                          "Pass the base that the members started from")


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


def _model(given: Model | str | Path, pretrained: bool, image_size: int | None) -> Model:
    if isinstance(given, Model):
        return given
    if not is_path(given) and isinstance(_reference(given), Name):
        return backbone(given, pretrained=pretrained, image_size=image_size, device="cpu")
    return load_model(given, device="cpu")


def _is_name(given: object) -> bool:
    return isinstance(given, str) and not is_path(given) and isinstance(_reference(given), Name)


def _spelled(given: Model | str | Path) -> str:
    return given.name if isinstance(given, Model) else str(given)


def _short(given: object) -> str:
    plain = isinstance(given, (str, os.PathLike, int, float))
    return repr(given) if plain else f"a {type(given).__name__}"


def _facts(model: Model, name: str) -> MemberFacts:
    shapes = {key: tuple(tensor.shape) for key, tensor in network(model).state_dict().items()}
    return MemberFacts(name=name, architecture=_architecture(model), classes=model.classes,
                       shapes=shapes, size=(model.image_size, model.image_size))


def _architecture(model: Model) -> str:
    member = next(model.each_member())
    if model.kind != "single" or member.blueprint is None:
        return model.name
    built = member.blueprint.backbone.partition(".")[0]
    activation = member.blueprint.activation
    return f"{built} with {activation}" if activation else built


def _asked_classes(
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


def _class_names(
    spec: FusionSpec, models: Sequence[Model], asked: tuple[str, ...] | None, *, counted: bool
) -> tuple[str, ...]:
    """The classes of the fused model: those that are asked for, for a new head; else the members'
    own. counted: only their number was asked for."""
    common = models[0].classes
    same = all(set(model.classes) == set(common) for model in models)
    fits = asked is None or asked == common or (counted and len(asked) == len(common))
    if spec.kind != "features":
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
    recipe: dict[str, Any] = {
        "strategy": spec.name, "kind": spec.kind, "options": dict(values), "seed": seed,
        "sources": [_source(model, spec.kind == "weights") for model in models],
    }
    if weight is not None:
        recipe["weight"] = weight
    if base is not None:
        recipe["base"] = _source(base, True)
    return recipe


def _source(model: Model, hashed: bool) -> dict[str, Any]:
    first, *others = [member.source for member in model.each_member()]
    shared = {key: value for key, value in first.items()
              if all(key in other and other[key] == value for other in others)}
    source: dict[str, Any] = {"name": model.name, "classes": len(model.classes), **shared}
    if hashed:  # their weights go into the fused ones, and only a hash can tell which they were
        source["state_sha256"] = digest(network(model).state_dict())
    if model.recipe:
        source["recipe"] = copy.deepcopy(model.recipe)
    return source


def _want_none(reference: object, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise OptionError(str(reference), f"{name} is fixed by the saved model; leave it out")
