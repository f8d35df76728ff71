"""Fuse weights: several networks of one architecture become one."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.assembly.given import (
    Members,
    Norms,
    keywords,
    reestimate_norms,
    repair_norms,
    settled,
    wants_repair,
)
from zoo.backbones.semantics import classifier_keys
from zoo.blueprints import Fusion
from zoo.datasets import ImageData
from zoo.errors import FusionError, OptionError
from zoo.fusion.align.repairing import shares_of
from zoo.fusion.heads import align_base, align_heads, join_heads
from zoo.fusion.merging import merge_states
from zoo.fusion.norms import norm_keys
from zoo.fusion.weighting import Weight, resolve_weights
from zoo.model import Model
from zoo.registry import load
from zoo.specs import FusionSpec
from zoo.store import network


def fuse_weights(
    spec: FusionSpec, models: Sequence[Model], base: Model | None, weight: Weight | None,
    values: Mapping[str, Any], *, seed: int, device: torch.device, images: ImageData | None,
    norms: Norms,
) -> tuple[Model, dict[str, Any], Members | None]:
    """A copy of the first model with the fused weights, on this device; what the strategy reports;
    and the members, where repair is wanted. Classifiers are matched by label name; of members that
    know different labels they are joined."""
    _want_same_preprocessing(models)
    nets = [network(model) for model in models]
    heads = classifier_keys(nets[0])
    states = [_on(device, net) for net in nets]
    classes = [model.classes for model in models]
    start = None if base is None else _on(device, network(base))
    averaged: frozenset[str] = frozenset()
    joined: dict[str, Tensor] = {}
    labels = models[0].classes
    if all(set(each) == set(labels) for each in classes):
        states = align_heads(states, classes, heads, strategy=spec.name)
        if start is not None and base is not None:
            start, averaged = align_base(start, base.classes, labels, heads, strategy=spec.name)
    else:
        labels, joined = join_heads(states, classes, heads, strategy=spec.name)
        states = [_without(heads, state) for state in states]
        start = None if start is None else _without(heads, start)
    fused = copy.deepcopy(models[0]).to(device)
    statistics = norm_keys(nets[0])
    report: dict[str, Any] = {}
    given = {**keywords(spec, fused, images, norms), "report": report}
    merged = merge_states(states, load(spec), spec=spec, base=start, weight=weight, options=values,
                          seed=seed, given=given, averaged=averaged, norm_keys=statistics)
    if joined:
        fused.reset_classes(labels)
    network(fused).load_state_dict({**merged, **joined})
    fused.fusion = Fusion(strategy=spec.name, kind="weights", options=dict(values))
    if statistics and len(models) > 1:
        next(fused.each_member()).norms = "repaired" if values.get("repair") else "pooled"
    _want_json(spec, report)
    members = None
    if images is not None and wants_repair(spec, models, norms):
        floating = [key for key, tensor in states[0].items() if tensor.is_floating_point()]
        members = Members(states, shares_of(resolve_weights(weight, floating, len(states),
                                                            spec.name)))
    return fused.eval(), report, members


def settle_norms(
    model: Model, norms: Norms, images: ImageData | None, members: Members | None
) -> None:
    """Choose how activations are normalised after a fusion of weights: as they were fused, by
    statistics of the images, repaired, or (auto) what is best on a held-out half of the images."""
    member = next(model.each_member())
    normed = bool(norm_keys(member.net))
    if norms == "pooled" or not (normed or members):
        return
    if images is None:
        if norms == "reestimated":
            raise OptionError("fuse", "norms='reestimated' needs images; pass data=")
        if member.norms == "pooled":
            warnings.warn("batch norm's statistics were pooled over the members; pass data= to let "
                          "validation choose between these and re-estimated ones, or "
                          "norms='pooled' if that is what you want", stacklevel=3)
        return
    if norms == "reestimated":
        reestimate_norms(model, images)
        member.norms = "reestimated"
    elif norms == "repair" and members:
        repair_norms(model, members, images)
        member.norms = "repaired"
    elif norms == "auto" and images.labels is not None:
        member.norms = settled(model, *images.split(0.5), norms, members)[1] or member.norms


def _without(heads: Collection[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in heads}


def _on(device: torch.device, net: nn.Module) -> dict[str, Tensor]:
    """The network's state on a device; tensors that are one stay one."""
    moved: dict[int, Tensor] = {}
    return {key: moved.setdefault(id(tensor), tensor.to(device))
            for key, tensor in net.state_dict(keep_vars=True).items()}


def _want_same_preprocessing(models: Sequence[Model]) -> None:
    first, *others = (next(model.each_member()).preprocessing for model in models)
    assert first is not None
    if any(other is None or (other.mean, other.std) != (first.mean, first.std) for other in others):
        warnings.warn("the members normalise images differently, and the fused network does it "
                      "like the first one", stacklevel=4)


def _want_json(spec: FusionSpec, report: object) -> None:
    try:
        json.dumps(report, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FusionError(spec.name, f"what it reports is not JSON: {error}",
                          "This is a defect of the strategy") from None


def want_single(spec: FusionSpec, names: Sequence[str], models: Sequence[Model]) -> None:
    """Raises FusionError for a model that is not one network."""
    for name, model in zip(names, models, strict=True):
        if model.kind != "single":
            raise FusionError(spec.name, f"{name} is itself a fusion ({model.fusion}), and weights "
                              "fuse only within single networks",
                              "Fuse the weights of its members first, or use 'concat' (features) "
                              "or 'mean' (outputs), which take fusions as members")
