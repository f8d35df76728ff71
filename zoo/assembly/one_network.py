"""Fuse weights: several networks of one architecture become one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from zoo.backbones.semantics import classifier_keys
from zoo.datasets import ImageData, load_data, loader, to_unit
from zoo.errors import FusionError, OptionError
from zoo.evaluation import predict
from zoo.fusion.heads import align_base, align_heads
from zoo.fusion.merging import merge_states
from zoo.fusion.norms import norm_keys, reestimate
from zoo.fusion.weighting import Weight
from zoo.measures import measure
from zoo.model import Fusion, Model
from zoo.registry import load
from zoo.specs import FusionSpec
from zoo.store import network

Norms = Literal["auto", "pooled", "reestimated"]


def fuse_weights(
    spec: FusionSpec, models: Sequence[Model], base: Model | None, weight: Weight | None,
    values: Mapping[str, Any],
) -> Model:
    """A copy of the first model with the fused weights, classifiers matched by label name."""
    _want_same_preprocessing(models)
    nets = [network(model) for model in models]
    heads = classifier_keys(nets[0])
    states = align_heads([net.state_dict() for net in nets], [model.classes for model in models],
                         heads, strategy=spec.name)
    start: dict[str, Tensor] | None = None
    averaged: frozenset[str] = frozenset()
    if base is not None:
        start, averaged = align_base(network(base).state_dict(), base.classes, models[0].classes,
                                     heads, strategy=spec.name)
    norms = norm_keys(nets[0])
    merged = merge_states(states, load(spec), spec=spec, base=start, weight=weight, options=values,
                          averaged=averaged, norm_keys=norms)
    fused = copy.deepcopy(models[0])
    network(fused).load_state_dict(merged)
    fused.fusion = Fusion(strategy=spec.name, kind="weights", options=dict(values))
    if norms and len(models) > 1:
        next(fused.each_member()).norms = "pooled"
    return fused.eval()


def settle_norms(model: Model, norms: Norms, data: Any) -> None:
    """Choose batch norm's running statistics after a fusion of weights: as they were fused,
    re-estimated on data, or (auto) what is better on a held-out half of the data."""
    member = next(model.each_member())
    keys = norm_keys(member.net)
    if not keys or norms == "pooled":
        return
    if data is None:
        if norms == "reestimated":
            raise OptionError("fuse", "norms='reestimated' needs images; pass data=")
        if member.norms == "pooled":
            warnings.warn("batch norm's statistics were pooled over the members; pass data= to let "
                          "validation choose between these and re-estimated ones, or "
                          "norms='pooled' if that is what you want", stacklevel=3)
        return
    images = load_data(data, role="train", image_size=model.image_size).with_classes(model.classes)
    if norms == "reestimated":
        _reestimate(model, images)
        return
    rest, held_out = images.split(0.5)
    fused = {key: tensor.clone() for key, tensor in member.net.state_dict().items() if key in keys}
    was, before = member.norms, _score(model, held_out)
    _reestimate(model, rest)
    if _score(model, held_out) < before:
        member.net.load_state_dict(fused, strict=False)
        member.norms = was


def _reestimate(model: Model, images: ImageData) -> None:
    # A last batch of one image has no variance.
    batches = loader(images, batch_size=128, drop_last=len(images) > 128)
    reestimate(model, (to_unit(pixels.to(model.device)) for pixels, _ in batches))
    next(model.each_member()).norms = "reestimated"


def _score(model: Model, images: ImageData) -> tuple[float, float]:
    assert images.labels is not None
    measured = measure(predict(model, images), images.labels, model.classes)
    return measured["accuracy"], -measured["nll"]


def _want_same_preprocessing(models: Sequence[Model]) -> None:
    first, *others = (next(model.each_member()).preprocessing for model in models)
    assert first is not None
    if any(other is None or (other.mean, other.std) != (first.mean, first.std) for other in others):
        warnings.warn("the members normalise images differently, and the fused network does it "
                      "like the first one", stacklevel=4)


def want_single(spec: FusionSpec, names: Sequence[str], models: Sequence[Model]) -> None:
    """Raises FusionError for a model that is not one network."""
    for name, model in zip(names, models, strict=True):
        if model.kind != "single":
            raise FusionError(spec.name, f"{name} is itself a fusion ({model.fusion}), and weights "
                              "fuse only within single networks",
                              "Fuse the weights of its members first, or use 'concat' (features) "
                              "or 'mean' (outputs), which take fusions as members")
