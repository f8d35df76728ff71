"""From a backbone's spec to a network, and from a network to a member."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from zoo.backbones import Preprocessing
from zoo.backbones.semantics import pooled_features, same_answer
from zoo.errors import OptionError
from zoo.fusion.norms import norm_keys
from zoo.model import Blueprint, Member
from zoo.options import accepts
from zoo.registry import load
from zoo.specs import BackboneSpec


def build_net(
    spec: BackboneSpec, *, num_classes: int | None, pretrained: bool, in_chans: int,
    image_size: int | None, options: Mapping[str, Any],
) -> nn.Module:
    """Call a backbone's builder with what it takes."""
    builder = load(spec)
    core: dict[str, Any] = {"num_classes": num_classes, "pretrained": pretrained,
                            "in_chans": in_chans}
    if accepts(builder, "name"):
        core["name"] = spec.name.partition("/")[2]
    if accepts(builder, "image_size"):
        core["image_size"] = image_size
    elif image_size is not None:
        raise OptionError(spec.name, "it has one input size; leave image_size out")
    net = builder(**core, **options)
    assert isinstance(net, nn.Module)
    return net


def member_of(
    net: nn.Module, name: str, classes: Sequence[str], blueprint: Blueprint,
    source: Mapping[str, Any],
) -> Member:
    """A network as a member: its preprocessing, and D of its pooled features, measured."""
    given: Any = getattr(net, "preprocessing", None)
    preprocessing = given if isinstance(given, Preprocessing) else Preprocessing(**(given or {}))
    norms = "frozen" if norm_keys(net) else "none"
    member = Member(net, name=name, classes=classes, dim=0, preprocessing=preprocessing,
                    blueprint=blueprint, source=source, norms=norms)
    measure_features(member)
    return member


@torch.no_grad()
def measure_features(member: Member) -> None:
    """D of the pooled features, and whether the classifier's answer to them is the network's."""
    training = member.training
    member.eval()
    assert member.preprocessing is not None
    like = next(member.parameters())
    blank = torch.rand(1, member.in_chans, *member.preprocessing.size).to(like)
    features = pooled_features(member.net, blank)
    member.dim = int(features.shape[1])
    member.splits = same_answer(member.net, features, member.net(blank))
    member.train(training)


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, with parameters that take no memory and no time to initialise; buffers
    are real, because some are computed and never saved."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            net = build()
    except (NotImplementedError, RuntimeError):
        return build()  # a constructor that computes with its parameters
    return build() if any(buffer.is_meta for buffer in net.buffers()) else net
