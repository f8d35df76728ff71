"""A frozen trunk is run once over the data; what comes after it trains from the kept features.

They are kept for the rest of the process: in a pipeline, a source's features serve its own probe,
its student and the models that it is fused into. Tokens and maps are many times as large as pooled
features; what there is no room for is computed anew in every epoch.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.backbones.semantics import classifier_keys
from zoo.datasets import ImageData, loader, to_unit
from zoo.model import Member, Model
from zoo.progress import task
from zoo.tensors.digest import digest

Features = tuple[Tensor, ...]

KEEP_BYTES = 512 * 2**20

# Least recently used first.
_kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()


def trunk_features(model: Model, data: ImageData, *, workers: int = 0) -> Features:
    """What each member gives of all images, [N, Dᵢ], [N, Tᵢ, Dᵢ] or [N, Dᵢ, hᵢ, wᵢ], in order, on
    the CPU.

    What a network of the same kind and weights gave for the same images is not computed again.
    The tensors are shared: copy before changing them.
    """
    images = data.without_labels().fingerprint()
    members = list(model.each_member())
    keys = [_key(member, images) for member in members]
    missing = {key: member for key, member in zip(keys, members, strict=True) if key not in _kept}
    found = {key: _kept[key] for key in keys if key in _kept}
    if missing:
        fresh = extract(
            model, data, lambda x: tuple(member.features(x) for member in missing.values()),
            workers=workers)
        found.update(zip(missing, fresh, strict=True))
    for key, features in found.items():
        _keep(key, features)
    return tuple(found[key] for key in keys)


@torch.no_grad()
def can_hold(model: Model, data: ImageData) -> bool:
    """Whether what its trunk gives of all images is to be computed once: pooled features always,
    tokens and maps as long as they take no more than KEEP_BYTES."""
    if model.takes == "vectors":
        return True
    with evaluating(model):
        one = model.trunk(to_unit(data.batch([0])[0].to(model.device)))
    return len(data) * sum(part.nbytes for part in one) <= KEEP_BYTES


def forget() -> None:
    """Give the memory of all kept features back."""
    _kept.clear()


@torch.no_grad()
def extract(
    model: Model,
    data: ImageData,
    compute: Callable[[Tensor], Features],
    *,
    batch_size: int = 64,
    description: str = "features",
    workers: int = 0,
) -> Features:
    """What `compute` gives for every image of the data, in order, on the CPU.

    compute: images [B, C, H, W] on [0, 1], on the model's device, to a tuple of tensors [B, …].
    The model is in evaluation mode meanwhile.
    """
    kept: list[Tensor] = []
    done = 0
    with evaluating(model), task(description, len(data), "images") as advance:
        for images, _ in loader(data, batch_size=batch_size, workers=workers):
            outputs = compute(to_unit(images.to(model.device, non_blocking=True)))
            if not kept:
                kept = [torch.empty((len(data), *out.shape[1:]), dtype=out.dtype)
                        for out in outputs]
            for whole, part in zip(kept, outputs, strict=True):
                whole[done:done + len(images)] = part
            done += len(images)
            advance(len(images))
    return tuple(kept)


def take(features: Sequence[Tensor], indices: Tensor, device: torch.device) -> Features:
    """The same rows of each, on a device."""
    return tuple(whole[indices].to(device, non_blocking=True) for whole in features)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """These models in evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _key(member: Member, images: str) -> tuple[str, ...]:
    """What the features depend on. The classifier comes after them and is left out: a probe
    replaces it and a fusion takes it off."""
    state = member.net.state_dict()
    if isinstance(member.net, Model):
        built = member.net.describe()
    else:
        for key in classifier_keys(member.net):
            del state[key]
        built = {**member.blueprint.as_dict(), "num_classes": None} if member.blueprint else {}
    told = json.dumps([built, member.preprocessing.as_dict() if member.preprocessing else None,
                       member.giving])
    return digest(state), told, next(member.net.parameters()).device.type, images


def _keep(key: tuple[str, ...], features: Tensor) -> None:
    _kept.pop(key, None)
    _kept[key] = features
    size = sum(kept.nbytes for kept in _kept.values())
    while size > KEEP_BYTES:
        _, oldest = _kept.popitem(last=False)
        size -= oldest.nbytes
