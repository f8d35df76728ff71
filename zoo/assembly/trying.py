"""What `auto` tries: members alone and fusions of them, fitted on some images and asked about
others, from features and logits that are computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.assembly.fusing import fuse
from zoo.assembly.material import Material, in_parts
from zoo.backbones import Preprocessing
from zoo.blueprints import Fusion
from zoo.building import build_fuser, seeded
from zoo.datasets import ImageData
from zoo.evaluation import predict
from zoo.features import Features
from zoo.fusion.norms import norm_keys
from zoo.member import Member
from zoo.model import Model
from zoo.options import checked
from zoo.specs import FusionSpec
from zoo.store import network
from zoo.training import transfer
from zoo.training.heads import train_head
from zoo.training.settings import Settings

# A fusion of weights looks at no more images in one try: each costs a pass through its network.
_LOOKED_AT = 512
# The log-probability of a class that a member does not know.
_UNKNOWN = -20.0
# Of a head: at the default of 1e-3 the few steps on small data do not reach the end.
_RATE = 3e-3


class Candidate:
    """Something to try.

    name: in the ranking. rank: 0 for a member alone, 1 for one network of fused weights, more for
    what runs all members. kind, strategy: of a fusion. options: all those with which it is built.
    classes: what its answers count.
    """

    rank = 0
    kind = "single"
    strategy: str | None = None
    options: Mapping[str, Any] = {}

    def __init__(self, material: Material, name: str, classes: Sequence[str]) -> None:
        self.material = material
        self.name = name
        self.classes = tuple(classes)

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        """Logits [asked, classes], after it was fitted on other images. Both are row numbers."""
        raise NotImplementedError

    def final(self, epochs: int) -> Model:
        """The model, fitted on all images."""
        raise NotImplementedError

    def parameters(self) -> int:
        """How many numbers the model has."""
        raise NotImplementedError

    def runs(self) -> list[int]:
        """The numbers of the members that it runs for an image."""
        return list(range(len(self.material.models)))


class Single(Candidate):
    """A member as it is. Of classes that it does not know it is wrong."""

    def __init__(self, material: Material, number: int) -> None:
        model = material.models[number]
        own = model.classes
        others = [name for name in material.given.classes if name not in own]
        super().__init__(material, f"member {number + 1} ({model.name})", (*own, *others))
        self.number = number

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        logits = self.material.alone(self.number)[asked].log_softmax(1)
        lacking = len(self.classes) - logits.shape[1]
        return functional.pad(logits, (0, lacking), value=_UNKNOWN)

    def final(self, epochs: int) -> Model:
        return copy.deepcopy(self.material.models[self.number]).eval()

    def parameters(self) -> int:
        return _count(self.material.models[self.number])

    def runs(self) -> list[int]:
        return [self.number]


class Probe(Single):
    """A member without a head for these classes: one is trained on its features."""

    def __init__(self, material: Material, number: int) -> None:
        super().__init__(material, number)
        self.name += ", probed"
        self.classes = material.images.classes
        self._twin: Model | None = None

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        model = self._fresh()
        features = self.material.embeddings[self.number]
        _train(self.material, model, (features,), fitting, epochs)
        return in_parts(model, model.classify, [features[asked]])

    def final(self, epochs: int) -> Model:
        model = copy.deepcopy(self._fresh())
        _transfer(self.material, model, epochs)
        return model

    def parameters(self) -> int:
        return _count(self._fresh())

    def _fresh(self) -> Model:
        if self._twin is None:
            self._twin = copy.deepcopy(self.material.models[self.number]).eval()
        with seeded(self.material.seed):
            self._twin.reset_classes(self.classes)
        return self._twin


def label(spec: FusionSpec, changed: Mapping[str, Any]) -> str:
    """`zoo/mean (of=logits)`."""
    told = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"{spec.name} ({told})" if told else spec.name


class FusionCandidate(Candidate):
    """A strategy with some of its options."""

    def __init__(
        self, material: Material, spec: FusionSpec, changed: Mapping[str, Any],
        classes: Sequence[str],
    ) -> None:
        super().__init__(material, label(spec, changed), classes)
        self.spec = spec
        self.kind, self.strategy = spec.kind, spec.name
        self.changed = dict(changed)
        self.options = checked(spec, changed)


class Weights(FusionCandidate):
    """One network; a try looks at images as `zoo.fuse` does, at some of them."""

    rank = 1

    def __init__(self, material: Material, spec: FusionSpec, changed: Mapping[str, Any]) -> None:
        super().__init__(material, spec, changed, material.known)
        looks = (spec.uses | spec.can_use) & {"data", "labels", "score"}
        self.looks = bool(looks) or bool(norm_keys(network(material.knowing[0])))

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        material = self.material
        if self.looks or material.fused is None or material.fused[0] is not self:
            material.fused = self, self._fuse(material.images.subset(fitting[:_LOOKED_AT]))
        return predict(material.fused[1], material.images.subset(asked))

    def final(self, epochs: int) -> Model:
        return self._fuse(self.material.images)

    def parameters(self) -> int:
        return _count(self.material.knowing[0])

    def runs(self) -> list[int]:
        return self.material.able[:1]

    def _fuse(self, images: ImageData) -> Model:
        material = self.material
        base = material.base if "base" in self.spec.uses | self.spec.can_use else None
        return fuse(material.knowing, self.spec.name, base=base, data=images, seed=material.seed,
                    device=material.device, **self.changed)


class Outputs(FusionCandidate):
    """Fitted, where it learns, on logits."""

    def __init__(self, material: Material, spec: FusionSpec, changed: Mapping[str, Any]) -> None:
        super().__init__(material, spec, changed, material.known)
        self.rank = 3 if spec.uses else 2
        self.side, self.logits = material.together(spec, self.options)

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        fuser = self._fuser()
        self._fit(fuser, fitting)
        logits = self.logits[:, asked].to(self.material.device)
        with torch.no_grad():
            answer: Tensor = fuser.eval()(logits, self.material.parts(asked))
        return answer.float().cpu()

    def final(self, epochs: int) -> Model:
        material = self.material
        model = fuse(material.knowing, self.spec.name, seed=material.seed, device=material.device,
                     **self.changed)
        told = self._fit(model.fuser, torch.arange(len(material.images)))
        if hasattr(model.fuser, "fit"):
            images = material.given.with_classes(self.classes)
            model.recipe["fitted_on"] = images.told()
        if told:
            model.recipe["fitted"] = dict(told)
        return model

    def parameters(self) -> int:
        return _count(self.side) + _count(self._fuser())

    def runs(self) -> list[int]:
        return self.material.able

    def _fuser(self) -> Any:
        with seeded(self.material.seed):
            return build_fuser(self.spec, list(self.side.each_member()), self.classes,
                               self.options).to(self.material.device)

    def _fit(self, fuser: Any, rows: Tensor) -> Mapping[str, Any] | None:
        """What the fit tells of itself."""
        if not hasattr(fuser, "fit"):
            return None
        wanted = {"features": self.material.parts(rows)} \
            if getattr(fuser, "wants_features", False) else {}
        device = self.material.device
        labels = self.material.labels(self.classes)[rows].to(device)
        with seeded(self.material.seed):
            told: Mapping[str, Any] | None = fuser.fit(self.logits[:, rows].to(device), labels,
                                                       **wanted)
        return told


class FeatureFusion(FusionCandidate):
    """A fuser and a classifier, trained on features."""

    rank = 4

    def __init__(self, material: Material, spec: FusionSpec, changed: Mapping[str, Any]) -> None:
        super().__init__(material, spec, changed, material.images.classes)
        self.side, self.features = material.beside(spec, self.options)

    def answers(self, fitting: Tensor, asked: Tensor, epochs: int) -> Tensor:
        model = self._fresh()
        _train(self.material, model, self.features, fitting, epochs)
        return in_parts(model, lambda *parts: model.classify(model.join(parts)),
                         [part[asked] for part in self.features], joined=False)

    def final(self, epochs: int) -> Model:
        material = self.material
        model = fuse(material.models, self.spec.name, classes=self.classes, seed=material.seed,
                     device=material.device, **self.changed)
        _transfer(material, model, epochs)
        return model

    def parameters(self) -> int:
        return sum(_count(member) for member in self.side.each_member()) + _count(self._fresh())

    def _fresh(self) -> Model:
        """What comes after the members; their networks are left out, because the loop copies and
        switches all that is in a model."""
        members = [Member(nn.Identity(), name=member.name, classes=(), dim=member.dim,
                          gives=member.gives, preprocessing=Preprocessing())
                   for member in self.side.each_member()]
        with seeded(self.material.seed):
            fuser = build_fuser(self.spec, members, self.classes, self.options)
            fusion = Fusion(strategy=self.spec.name, kind=self.kind, options=self.options)
            return Model(members, classes=self.classes, fuser=fuser,
                         fusion=fusion).eval().to(self.material.device)


OF_KIND: Mapping[str, Callable[[Material, FusionSpec, Mapping[str, Any]], Candidate]] = {
    "weights": Weights, "outputs": Outputs, "features": FeatureFusion}


def _settings(material: Material, images: int, epochs: int) -> dict[str, Any]:
    """Of a head that is trained on so many images."""
    return {"epochs": epochs, "lr": _RATE, "batch_size": 64 if images < 1024 else 256,
            "seed": material.seed}


def _train(
    material: Material, model: Model, features: Features, rows: Tensor, epochs: int
) -> None:
    train_head(model, material.images.subset(rows), tuple(part[rows] for part in features),
               Settings(**_settings(material, len(rows), epochs)))


def _transfer(material: Material, model: Model, epochs: int) -> None:
    """The same on all images and through the front door, which writes it into the recipe."""
    transfer(model, material.images, "linear_probe",
             **_settings(material, len(material.images), epochs))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
