"""Let a saved network look at images of another size."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from zoo.backbones.semantics import classifier_keys, pooled_features
from zoo.errors import OptionError
from zoo.member import Member
from zoo.model import Model
from zoo.store import network


def at_one_size(models: Sequence[Model]) -> list[Model]:
    """The models; in place of those whose tensors differ from the first's because they look at
    images of another size, copies that look at the first's, with position embeddings resampled by
    timm. Those that cannot do that stay as they are."""
    return [models[0], *(_at(models[0].image_size, models[0], model) for model in models[1:])]


def _at(side: int, first: Model, model: Model) -> Model:
    if model.image_size == side or not _comparable(first, model) or _fit(first, model):
        return model
    twin = copy.deepcopy(model)
    try:
        resize(twin, side, "fuse")
    except OptionError:
        return model
    return twin if _fit(first, twin) else model


def _comparable(*models: Model) -> bool:
    return (all(model.kind == "single" and not isinstance(network(model), Model)
                for model in models)
            and len({type(network(model)) for model in models}) == 1)


def _fit(first: Model, model: Model) -> bool:
    """Whether each tensor of the same name has the same shape but for the classifier's rows."""
    heads = classifier_keys(network(first))
    other = network(model).state_dict()
    return all(key in heads or key not in other or other[key].shape == tensor.shape
               for key, tensor in network(first).state_dict().items())


def resize(model: Model, side: int, owner: str) -> None:
    """Make a model of one network look at squares of this many pixels, in place. A network of fixed
    size has its position embeddings resampled, by timm.

    Raises OptionError when the network cannot, or when there are several.
    """
    member = next(model.each_member())
    net: Any = member.net
    if model.kind != "single" or isinstance(net, Model) or member.blueprint is None:
        raise OptionError(owner, "image_size is fixed by the saved model: it has several members; "
                          "leave it out")
    assert member.preprocessing is not None
    if side == member.size:
        return
    fixed = bool((getattr(net, "pretrained_cfg", None) or {}).get("fixed_input_size"))
    try:
        if fixed:
            net.set_input_size(img_size=(side, side))
        member.preprocessing = member.preprocessing.at(side)
        _try(member)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:
        raise OptionError(owner, f"image_size is {side}, and the network cannot look at squares of "
                          f"that many pixels ({str(error).splitlines()[0]})") from error
    config = member.blueprint.config
    if config is not None:
        channels = config["pretrained_cfg"]["input_size"][0]
        arguments = {**config["model_args"], **({"img_size": side} if fixed else {})}
        config = {**config, "model_args": arguments, "pretrained_cfg": {
            **config["pretrained_cfg"], "input_size": [channels, side, side]}}
    member.blueprint = replace(member.blueprint, image_size=side, config=config)


@torch.no_grad()
def _try(member: Member) -> None:
    training = member.training
    member.eval()
    where = next(member.net.parameters()).device
    blank = torch.zeros(1, member.in_chans, member.size, member.size, device=where)
    pooled_features(member.net, member.prepare(blank))
    member.train(training)
