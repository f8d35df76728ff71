"""From a backbone's spec to a network, and from a network to a member."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from zoo.backbones import Preprocessing
from zoo.backbones.semantics import pooled_features, same_answer
from zoo.blueprints import Blueprint
from zoo.errors import OptionError, PluginError
from zoo.fusion.norms import norm_keys
from zoo.labels import ByLabel
from zoo.member import Member
from zoo.options import accepts
from zoo.registry import load
from zoo.specs import BackboneSpec, FusionSpec

_SEMANTICS = ("forward_features", "forward_head", "get_classifier", "reset_classifier")


def build_net(
    spec: BackboneSpec, *, num_classes: int | None, pretrained: bool, in_chans: int,
    image_size: int | None, options: Mapping[str, Any],
) -> nn.Module:
    """Call a backbone's builder with what it takes.

    Raises OptionError for channels or a size that it cannot change, PluginError when what it gives
    has not timm's semantics.
    """
    builder = load(spec)
    core: dict[str, Any] = {"num_classes": num_classes, "pretrained": pretrained}
    if accepts(builder, "name"):
        core["name"] = spec.name.partition("/")[2]
    for name, given, usual in (("in_chans", in_chans, 3), ("image_size", image_size, None)):
        if accepts(builder, name):
            core[name] = given
        elif given != usual:
            raise OptionError(spec.name, f"it cannot change {name}; leave it out")
    net = builder(**core, **options)
    if not isinstance(net, nn.Module):
        raise PluginError(spec.name, None, f"{spec.build} gave {type(net).__name__}, expected a "
                          "torch.nn.Module")
    missing = [method for method in _SEMANTICS if not hasattr(net, method)]
    if missing:
        raise PluginError(spec.name, None, f"{type(net).__name__} has no {', '.join(missing)}, "
                          "which every backbone has, as in timm")
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
    member.eval()
    assert member.preprocessing is not None
    noise = torch.rand(1, member.in_chans, *member.preprocessing.size,
                       generator=torch.Generator().manual_seed(0))
    x = noise.to(next(member.parameters()))
    features = pooled_features(member.net, x)
    member.dim = int(features.shape[1])
    member.splits = same_answer(member.net, features, member.net(x))


@torch.no_grad()
def measure_given(member: Member, given: str) -> None:
    """Let a member give vectors, tokens or maps from now on, of its layers and by its pool, and
    measure their D. Raises ZooError where it has none."""
    member.gives = given
    member.eval()
    blank = torch.zeros(1, member.in_chans, member.size, member.size,
                        device=next(member.parameters()).device)
    member.dim = int(member.features(blank).shape[2 if given == "tokens" else 1])


def build_fuser(
    spec: FusionSpec, members: Sequence[Member], classes: Sequence[str], options: Mapping[str, Any]
) -> nn.Module:
    """What joins these members' features, or their answers over these classes."""
    builder = load(spec)
    dims = [member.dim for member in members]
    if spec.kind == "features":
        return builder(dims, **options)  # type: ignore[no-any-return]
    core: dict[str, Any] = {"dims": dims} if accepts(builder, "dims") else {}
    if accepts(builder, "known"):
        core["known"] = ByLabel([member.classes for member in members], classes).known
    return builder(len(members), len(classes), **core, **options)  # type: ignore[no-any-return]


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers of its own for the CPU, from this seed; None leaves torch's as they are.

    Raises OptionError for what is no whole number of 64 bits.
    """
    if seed is not None and (not isinstance(seed, int) or not -2**63 <= seed < 2**64):
        raise OptionError("seed", f"{seed!r} is no seed, expected a whole number below 2**64")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed reseeds the GPUs too
        yield


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, with parameters that take no memory and no time to initialise; buffers
    are real, because some are computed and never saved."""
    try:
        with _on_meta():
            net = build()
    except (NotImplementedError, RuntimeError):
        return build()  # a constructor that computes with its parameters
    return build() if any(buffer.is_meta for buffer in net.buffers()) else net


@contextmanager
def _on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(
        module: nn.Module, name: str, parameter: nn.Parameter | None
    ) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
