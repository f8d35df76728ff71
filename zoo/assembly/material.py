"""What the members of a fusion say of all images, computed once for everything that is tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.assembly.side_by_side import put_side_by_side
from zoo.datasets import ImageData
from zoo.errors import FusionError
from zoo.evaluation import predict
from zoo.features import Features, can_hold, evaluating, extract, trunk_features
from zoo.model import Model
from zoo.specs import FusionSpec

_CHUNK = 1024


class Material:
    """The members on one device, and what they say of all images, each computed when it is first
    asked for and kept.

    models: all members. able: the numbers of those that know classes of the data. images: the data,
    with the classes that a new head is to have. given: the same with their own classes.
    """

    def __init__(
        self, models: Sequence[Model], able: Sequence[int], images: ImageData, given: ImageData,
        base: Model | None, *, seed: int, device: torch.device,
    ) -> None:
        self.models = [model if model.device == device else copy.deepcopy(model).to(device)
                       for model in models]
        self.able = list(able)
        self.images = images
        self.given = given
        self.base = base
        self.seed = seed
        self.device = device
        self.embeddings = tuple(_embedded(model, images) for model in self.models)
        self.fused: tuple[object, Model] | None = None  # the last one: many would not fit
        self._alone: dict[int, Tensor] = {}
        self._sides: dict[str, tuple[Model, Features]] = {}
        self._logits: Tensor | None = None

    @property
    def knowing(self) -> list[Model]:
        """The members that know classes of the data."""
        return [self.models[number] for number in self.able]

    @property
    def known(self) -> tuple[str, ...]:
        """All classes that these know."""
        return tuple(dict.fromkeys(name for model in self.knowing for name in model.classes))

    def labels(self, classes: Sequence[str]) -> Tensor:
        """Of all images, counted in these classes."""
        labels = self.given.with_classes(classes).labels
        assert labels is not None
        return labels

    def alone(self, number: int) -> Tensor:
        """A member's own logits of all images."""
        if number not in self._alone:
            model = self.models[number]
            self._alone[number] = (
                in_parts(model, model.classify, [self.embeddings[number]]) if model.splits
                else predict(model, self.images))
        return self._alone[number]

    def beside(self, spec: FusionSpec, values: Mapping[str, Any]) -> tuple[Model, Features]:
        """The members, ready for fusions of features that take the same, and what they give.

        Raises FusionError where there is no room for it.
        """
        if spec.takes not in self._sides:
            side = put_side_by_side(spec, self.models, self.images.classes, values).to(self.device)
            if spec.takes == "vectors":
                features: Features = self.embeddings
            elif can_hold(side, self.images):
                features = trunk_features(side, self.images)
            else:
                raise FusionError(spec.name, f"the {spec.takes} of {len(self.images):,} images "
                                  "take more room than is kept", "Try it alone")
            self._sides[spec.takes] = side, features
        return self._sides[spec.takes]

    def together(self, spec: FusionSpec, values: Mapping[str, Any]) -> tuple[Model, Tensor]:
        """The members, ready for fusions of outputs, and their logits [M, N, C] of all images, in
        one order."""
        if "outputs" not in self._sides:
            side = put_side_by_side(spec, self.knowing, self.known, values)
            side.to(self.device).fuser = _Logits()
            if side.splits:
                parts = [self.embeddings[number] for number in self.able]
                self._logits = in_parts(side, lambda x: side.classify(x).transpose(0, 1), parts)
            else:
                self._logits, = extract(side, self.images,
                                        lambda x: (side(x).transpose(0, 1),), description="logits")
            self._logits = self._logits.float().transpose(0, 1)
            self._sides["outputs"] = side, ()
        assert self._logits is not None
        return self._sides["outputs"][0], self._logits

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The features of the members that know the classes, for fusions of outputs."""
        return [self.embeddings[number][rows].to(self.device) for number in self.able]


class _Logits(nn.Module):
    """The members' logits [M, B, C], undecided."""

    def forward(self, logits: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return logits


@torch.no_grad()
def _embedded(model: Model, images: ImageData) -> Tensor:
    if not can_hold(model, images):
        return extract(model, images, lambda x: (model.embed(x),))[0]
    parts = trunk_features(model, images)
    return in_parts(model, lambda *each: model.join(each), parts, joined=False)


@torch.no_grad()
def in_parts(
    model: Model, compute: Callable[..., Tensor], parts: Sequence[Tensor], *, joined: bool = True
) -> Tensor:
    """What `compute` gives of features, a part of the rows at a time, on the CPU. joined: it
    takes them side by side."""
    found = []
    with evaluating(model):
        for first in range(0, len(parts[0]), _CHUNK):
            rows = [part[first:first + _CHUNK].to(model.device) for part in parts]
            found.append(compute(torch.cat(rows, 1)) if joined else compute(*rows))
    return torch.cat([part.float().cpu() for part in found])
