"""A frozen trunk is run once over the data; what comes after it trains from the kept features.

They are kept for the rest of the process, and in the cache folder (`zoo.cache.kept`) where that
saves time: in a pipeline, a source's features serve its own probe, its student, the models that it
is fused into and their evaluation, and those of the next run. Tokens and maps are many times as
large as pooled features; what there is no room for is computed anew in every epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.backbones.semantics import classifier_keys
from zoo.cache.kept import limit
from zoo.datasets import ImageData, loader, to_unit
from zoo.errors import OptionError
from zoo.member import Member
from zoo.model import Inner, Model
from zoo.progress import task
from zoo.tensors.digest import digest
from zoo.tensors.kept import keep, kept

Features = tuple[Tensor, ...]

KEEP_BYTES = 512 * 2**20
# On the disk goes what takes longer to compute than to write and read again, with a margin.
DISK_LEAST_BYTES = 2**20
DISK_LEAST_SECONDS = 1.0
DISK_BYTES_PER_SECOND = 50e6

_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What a description of a member says that its features do not depend on.
_ASIDE = ("name", "classes", "norms", "source", "splits")
_CHECKED_IMAGES = 4

# Least recently used first.
_kept: OrderedDict[tuple[str, ...], Tensor] = OrderedDict()


@dataclass(frozen=True)
class Given:
    """Something that a network gives of every image, and all that it depends on but the images.

    name: of the network, for people. told: how it is built and what it gives, as JSON values.
    state: its weights. compute: images [B, C, H, W] on [0, 1] to a tensor [B, …].
    """

    name: str
    told: Any
    state: Mapping[str, Tensor]
    compute: Callable[[Tensor], Tensor]


def trunk_features(model: Model, data: ImageData, *, workers: int = 0) -> Features:
    """What each member gives of all images, [N, Dᵢ], [N, Tᵢ, Dᵢ] or [N, Dᵢ, hᵢ, wᵢ], in order, on
    the CPU.

    What a network of the same kind and weights gave for the same images is not computed again.
    The tensors are shared: copy before changing them.
    """
    return given_once(model, data, [features_of(member) for member in model.each_member()],
                      workers=workers)


def features_of(member: Member) -> Given:
    """A member's features. The classifier comes after them and is left out: a probe replaces it and
    a fusion takes it off."""
    state = member.net.state_dict()
    if not isinstance(member, Inner):
        for key in classifier_keys(member.net):
            del state[key]
    return Given(member.name, about_trunk(member), state, member.features)


def logits_of(member: Member) -> Given:
    """A member's own logits."""
    return Given(member.name, [about_trunk(member), "logits"], member.net.state_dict(), member)


def about_trunk(member: Member) -> dict[str, Any]:
    """How a member's network is built and what it gives: all that its features depend on beside
    the weights, whatever a description says in later versions."""
    (described,) = Model([member], classes=member.classes).describe()["members"]
    told = {name: value for name, value in described.items() if name not in _ASIDE}
    if "build" in told:
        told["build"] = {**told["build"], "num_classes": None}
    return told


def given_once(
    model: Model, data: ImageData, wanted: Sequence[Given], *, description: str = "features",
    workers: int = 0,
) -> Features:
    """What parts of a model give of all images, each [N, …], in order, on the CPU: as it was kept
    in this process or in the cache folder, otherwise computed in one pass over the data, and kept.

    Images of which the fingerprint reads only some are kept in this process alone.
    """
    images = data.without_labels().fingerprint()
    rounded = _rounded_to()
    on_disk = not data.sampled and limit() > 0
    keys = [_key(each, model, images, rounded) for each in wanted]
    found: dict[tuple[str, ...], Tensor] = {}
    missing: dict[tuple[str, ...], Given] = {}
    for key, each in zip(keys, wanted, strict=True):
        known = _kept.get(key)
        if known is None and on_disk:
            known = _from_disk(key, each, model, data)
        if known is None:
            missing[key] = each
        else:
            found[key] = known
    if missing:
        start = time.perf_counter()
        fresh = extract(
            model, data, lambda x: tuple(each.compute(x) for each in missing.values()),
            description=description, workers=workers)
        seconds = time.perf_counter() - start
        found.update(zip(missing, (_round(part, rounded) for part in fresh), strict=True))
        size = sum(found[key].nbytes for key in missing)
        if on_disk and size >= DISK_LEAST_BYTES and seconds >= max(
                DISK_LEAST_SECONDS, size / DISK_BYTES_PER_SECOND):
            for key, each in missing.items():
                found[key] = _to_disk(key, each, found[key], images)
    for key, features in found.items():
        _keep(key, features)
    return tuple(found[key] for key in keys)


@torch.no_grad()
def can_hold(model: Model, data: ImageData, copies: int = 1) -> bool:
    """Whether what its trunk gives of all images, or of so many copies of them, is to be computed
    once: pooled features always, tokens and maps where there is room."""
    if model.takes == "vectors":
        return True
    with evaluating(model):
        one = model.trunk(to_unit(data.batch([0])[0].to(model.device)))
    return has_room(copies * len(data) * sum(part.nbytes for part in one))


def has_room(size: int) -> bool:
    """Whether so many bytes may be kept in memory."""
    return size <= KEEP_BYTES


def forget() -> None:
    """Give the memory of all kept features back; what is on the disk stays."""
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


def take(features: Sequence[Tensor], indices: Tensor | slice, device: torch.device) -> Features:
    """The same rows of each, on a device; those that were rounded to be kept as float32."""
    rounded = _rounded_to()
    rows = (whole[indices].to(device, non_blocking=True) for whole in features)
    return tuple(part.float() if part.dtype == rounded else part for part in rows)


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


def _key(
    given: Given, model: Model, images: str, rounded: torch.dtype | None
) -> tuple[str, ...]:
    return (digest(given.state), json.dumps(given.told, sort_keys=True), model.device.type, images,
            str(rounded), zoo.__version__, torch.__version__, timm.__version__)


def _keep(key: tuple[str, ...], features: Tensor) -> None:
    _kept.pop(key, None)
    _kept[key] = features
    size = sum(each.nbytes for each in _kept.values())
    while size > KEEP_BYTES:
        _, oldest = _kept.popitem(last=False)
        size -= oldest.nbytes


def _from_disk(
    key: tuple[str, ...], given: Given, model: Model, data: ImageData
) -> Tensor | None:
    """What is on the disk, if the network still says the same of a few of the images: its code may
    have changed, which no key can tell."""
    whole = kept(_name(key))
    if whole is None or len(whole) != len(data):
        return None
    rows = torch.linspace(0, len(data) - 1, min(_CHECKED_IMAGES, len(data))).long()
    with evaluating(model), torch.no_grad():
        now = given.compute(to_unit(data.batch(rows)[0].to(model.device))).cpu().float()
    then = whole[rows].float()
    if now.shape != then.shape:
        return None
    allowed = (2e-2 if whole.itemsize == 2 else 5e-3) * float(now.abs().max())
    return whole if bool(((now - then).abs() <= allowed).all()) else None


def _to_disk(key: tuple[str, ...], given: Given, features: Tensor, images: str) -> Tensor:
    """The features, as a map of the file where they could be written, so that they need no memory
    of their own."""
    about = {"model": given.name, "images": str(len(features)), "data": images,
             "shape": json.dumps(list(features.shape)), "dtype": str(features.dtype)}
    if not keep(_name(key), features, about):
        return features
    mapped = kept(_name(key))
    return features if mapped is None else mapped


def _name(key: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]


def _rounded_to() -> torch.dtype | None:
    """The dtype that `ZOO_FEATURES_DTYPE` asks for; None keeps what the network computes."""
    given = os.environ.get("ZOO_FEATURES_DTYPE") or "float32"
    if given not in _DTYPES:
        raise OptionError("ZOO_FEATURES_DTYPE", f"it is {given!r}, expected {', '.join(_DTYPES)}")
    return _DTYPES[given]


def _round(features: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The features in half precision, unless that cannot hold them."""
    if dtype is None or features.dtype != torch.float32:
        return features
    half = features.to(dtype)
    return half if bool(half.isfinite().all()) or not bool(features.isfinite().all()) else features
