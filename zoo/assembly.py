"""Names in, models out: build a network by name, fuse several."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.backbones.activations import swap_activations
from zoo.backbones.semantics import classifier_keys
from zoo.building import build_net, member_of
from zoo.datasets import ImageData, load_data, loader, to_unit
from zoo.device import resolve_device, resolve_dtype
from zoo.errors import BadName, FusionError, OptionError, UnknownName
from zoo.evaluation import predict
from zoo.fusion.heads import align_base, align_heads
from zoo.fusion.merging import merge_states
from zoo.fusion.norms import norm_keys, reestimate
from zoo.fusion.planning import MemberFacts, check
from zoo.fusion.weighting import Weight
from zoo.measures import measure
from zoo.model import Blueprint, Fusion, Member, Model
from zoo.names import Address, Name, is_path, parse
from zoo.options import checked
from zoo.registry import find, load
from zoo.specs import BackboneSpec, FusionSpec
from zoo.store import digest
from zoo.store import load as load_model

Norms = Literal["auto", "pooled", "reestimated"]


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
    """Build one network as a Model.

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
    if classes is not None:
        if num_classes not in (None, len(classes)):
            raise OptionError(str(name), f"num_classes is {num_classes} and there are "
                              f"{len(classes)} class names; give one of the two")
        num_classes = len(classes)
    reference = _reference(name)
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(reference, Name):
            model = _registered(str(name), num_classes, classes, pretrained, in_chans, image_size,
                                activation, options)
        else:
            model = load_model(reference, device="cpu")
            _want_none(reference, in_chans=in_chans - 3, image_size=image_size, **options)
            if activation:
                model.set_activation(activation)
            names = tuple(classes or map(str, range(num_classes or 0))) or model.classes
            if names != model.classes:
                model.reset_classes(names)
    return model.to(where, resolve_dtype(dtype) if dtype is not None else None)


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
    """Make one model of several. The members are copied and never changed.

    members: models, names (with pretrained weights, unless pretrained=False), paths or addresses.
    strategy: by name; `zoo.list_fusions()` lists them. A fusion of weights gives one network of
        the members' architecture; of features, one with a fresh head for num_classes or classes
        (by default the members' common ones), to be trained by `zoo.transfer`; of outputs, one
        that averages answers, fitted on `data` where the strategy learns.
    base: the model that the members started from, for strategies that work on differences.
    data: labelled images that nothing was trained on and no test will use.
    weight: for a fusion of weights: a number per member, or `{pattern: number(s)}` over tensors.
    norms: running statistics of batch norm after a fusion of weights: `"pooled"` over the members,
        `"reestimated"` on data, or whichever is better on a held-out part of the data (auto).
    device: by default that of the first member that is a model. options: the strategy's own.

    Raises FusionError, which says why not and what would work instead; UnknownName; OptionError.
    """
    spec = find(strategy, FusionSpec)
    values = checked(spec, options)
    if isinstance(members, (str, os.PathLike, Model)):
        raise FusionError(spec.name, f"the members are {members!r}, expected a list of models, "
                          "names or paths")
    if weight is not None and spec.kind != "weights":
        raise OptionError(spec.name, "weight belongs to fusions of weights; leave it out")
    models = [_model(member, pretrained, image_size) for member in members]
    started_from = None if base is None else _model(base, pretrained, image_size)
    given = [member for member in members if isinstance(member, Model)]
    where = given[0].device if given and device is None else resolve_device(device)
    check(spec, [_facts(model) for model in models], has_base=base is not None,
          has_data=data is not None or spec.kind == "outputs")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if spec.kind == "weights":
            fused = _fuse_weights(spec, models, started_from, weight, values, seed)
            fused.to(where)
            _settle_norms(fused, norms, data)
        else:
            names = tuple(classes) if classes else _class_names(spec, models, num_classes)
            fused = _side_by_side(spec, models, names, values, seed).to(where)
    if spec.kind == "outputs" and hasattr(fused.fuser, "fit") and data is not None:
        _fit_outputs(fused, data)
    return fused.to(dtype=resolve_dtype(dtype)) if dtype is not None else fused


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
    net = build_net(spec, num_classes=num_classes, pretrained=pretrained, in_chans=in_chans,
                    image_size=image_size, options=values)
    if activation:
        swap_activations(net, activation)
    outputs = int(getattr(net, "num_classes", 0) or num_classes or 0)
    names = tuple(classes) if classes else _native_classes(net, outputs)
    blueprint = Blueprint(backbone=spec.name, num_classes=outputs, in_chans=in_chans,
                          image_size=image_size, activation=activation, options=values)
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


def _facts(model: Model) -> MemberFacts:
    shapes = {key: tuple(tensor.shape) for key, tensor in network(model).state_dict().items()}
    return MemberFacts(name=model.name, architecture=_architecture(model), classes=model.classes,
                       shapes=shapes, size=(model.image_size, model.image_size))


def _architecture(model: Model) -> str:
    member = next(model.each_member())
    if model.kind != "single" or member.blueprint is None:
        return f"a fusion ({model.fusion})"
    return member.blueprint.backbone.partition(".")[0]


def network(model: Model) -> nn.Module:
    """The one network of a single model; the model itself when it has several."""
    return next(model.each_member()).net if model.kind == "single" else model


def _fuse_weights(
    spec: FusionSpec, models: Sequence[Model], base: Model | None, weight: Weight | None,
    values: Mapping[str, Any], seed: int,
) -> Model:
    nets = [network(model) for model in models]
    heads = classifier_keys(nets[0])
    states = align_heads([net.state_dict() for net in nets], [model.classes for model in models],
                         heads, strategy=spec.name)
    start: dict[str, Tensor] | None = None
    averaged: frozenset[str] = frozenset()
    if base is not None and "base" in spec.uses:
        start, averaged = align_base(network(base).state_dict(), base.classes, models[0].classes,
                                     heads, strategy=spec.name)
    merged = merge_states(states, load(spec), spec=spec, base=start, weight=weight, options=values,
                          averaged=averaged, norm_keys=norm_keys(nets[0]))
    fused = copy.deepcopy(models[0])
    network(fused).load_state_dict(merged)
    fused.fusion = Fusion(strategy=spec.name, kind="weights", options=dict(values))
    fused.recipe = _recipe(spec, values, seed, models, base, weight)
    member = next(fused.each_member())
    if norm_keys(nets[0]):
        member.norms = "pooled" if len(models) > 1 else next(models[0].each_member()).norms
    return fused


def _side_by_side(
    spec: FusionSpec, models: Sequence[Model], classes: Sequence[str], values: Mapping[str, Any],
    seed: int,
) -> Model:
    """Members beside each other and what joins their features or outputs."""
    members = []
    for model in models:
        twin = copy.deepcopy(model).cpu()
        member = next(twin.each_member()) if twin.kind == "single" else Member(
            twin, name=str(twin.fusion), classes=twin.classes, dim=twin.dim)
        member.source = {**member.source, "recipe": model.recipe} if model.recipe else member.source
        if spec.kind == "features" and member.blueprint is not None:
            member.drop_head()
        members.append(member)
    builder = load(spec)
    if spec.kind == "features":
        fuser = builder([member.dim for member in members], **values)
    else:
        fuser = builder(len(members), len(classes), **values)
    return Model(members, classes=classes, fuser=fuser, recipe=_recipe(spec, values, seed, models),
                 fusion=Fusion(strategy=spec.name, kind=spec.kind, options=dict(values))).eval()


def _class_names(
    spec: FusionSpec, models: Sequence[Model], num_classes: int | None
) -> tuple[str, ...]:
    """The members' common classes; else, for a new head, that many numbers."""
    common = models[0].classes
    if spec.kind == "outputs":
        if num_classes not in (None, len(common)):
            raise OptionError(spec.name, f"the members have {len(common)} classes, and num_classes "
                              f"is {num_classes}; fuse features to get a head for others")
        return common
    same = all(set(model.classes) == set(common) for model in models)
    if same and num_classes in (None, len(common)):
        return common
    if num_classes is None:
        raise OptionError(spec.name, "the members have different classes; pass num_classes= or "
                          "classes= for the new head")
    return tuple(map(str, range(num_classes)))


def _settle_norms(model: Model, norms: Norms, data: Any) -> None:
    """Choose batch norm's running statistics after a fusion of weights."""
    member = next(model.each_member())
    if norms not in ("auto", "pooled", "reestimated"):
        raise OptionError("fuse", f"norms is {norms!r}, expected auto, pooled or reestimated")
    if not norm_keys(member.net) or norms == "pooled" or member.norms != "pooled":
        return
    if data is None:
        if norms == "reestimated":
            raise OptionError("fuse", "norms='reestimated' needs images; pass data=")
        warnings.warn("batch norm's statistics were pooled over the members; pass data= to let "
                      "validation choose between these and re-estimated ones", stacklevel=3)
        return
    images = load_data(data, role="train", image_size=model.image_size).with_classes(model.classes)
    if norms == "reestimated":
        _reestimate(model, images)
        return
    rest, held_out = images.split(0.5)
    pooled = {key: tensor.clone() for key, tensor in member.net.state_dict().items()
              if key in norm_keys(member.net)}
    before = _score(model, held_out)
    _reestimate(model, rest)
    if _score(model, held_out) < before:
        member.net.load_state_dict(pooled, strict=False)
        member.norms = "pooled"


def _reestimate(model: Model, images: ImageData) -> None:
    batches = (to_unit(pixels.to(model.device)) for pixels, _ in loader(images, batch_size=128))
    reestimate(model, batches)
    next(model.each_member()).norms = "reestimated"


def _score(model: Model, images: ImageData) -> tuple[float, float]:
    assert images.labels is not None
    measured = measure(predict(model, images), images.labels, model.classes)
    return measured["accuracy"], -measured["nll"]


@torch.no_grad()
def _fit_outputs(model: Model, data: Any) -> None:
    images = load_data(data, role="train", image_size=model.image_size).with_classes(model.classes)
    single = [Model([member], classes=model.classes) for member in model.each_member()]
    logits = torch.stack([predict(one, images) for one in single])  # (M, N, C)
    with torch.enable_grad():
        model.fuser.fit(logits.to(model.device), images.labels.to(model.device))  # type: ignore[union-attr, operator]
    model.recipe["fitted_on"] = {"images": len(images), "data": images.fingerprint()}


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
    source: dict[str, Any] = {"name": model.name, "classes": len(model.classes)}
    for member in model.each_member():
        source.update({key: value for key, value in member.source.items() if key != "recipe"})
    if hashed:  # their weights go into the fused ones, and only a hash can tell which they were
        source["state_sha256"] = digest(network(model).state_dict())
    if model.recipe:
        source["recipe"] = model.recipe
    return source


def _want_none(reference: object, **given: Any) -> None:
    for name, value in given.items():
        if value:
            raise OptionError(str(reference), f"{name} is fixed by the saved model; leave it out")
