"""What zoo builds, trains, fuses and saves: images on [0, 1] in, logits out.

A `Model` is one or more `Member`s. A single network, or one made by fusing weights, is a model of
one member; features or outputs of several members meet in a `fuser`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbones.pixels import Pictures, pictures
from zoo.backbones.semantics import on_one_grid
from zoo.blueprints import Fusion
from zoo.errors import FusionError, ZooError
from zoo.labels import ByLabel
from zoo.member import Member
from zoo.tensors.digest import digest


class Way:
    """In which way members run; `zoo.inference` has them, and measures which is fastest."""

    def run(self, members: Sequence[Member], act: str, pictures: Pictures) -> Sequence[Tensor]:
        """What each member's method `act` gives of the images, without gradients."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model has none: it belongs to these members on this machine."""
        return type(None), ()


class Model(nn.Module):
    """Images, float [B, 3, H, W] on [0, 1], in; logits [B, classes] out (a fusion of outputs
    gives log-probabilities).

    Each member resizes and normalises inside, so families mix, and a change of ε to the input is
    a change of ε to the pixels.

    members: an nn.ModuleList of Member. fusion: how they were fused, or None. classes: the names
    that the logits count. recipe: where all of it comes from, as JSON values. image_size: what a
    loader should hand in, the largest size a member asks for.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        classes: Sequence[str],
        fusion: Fusion | None = None,
        fuser: nn.Module | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.fusion = fusion
        self.fuser = fuser
        self.classes = tuple(classes)
        self.recipe: dict[str, Any] = dict(recipe or {})
        self.head: nn.Module | None = None
        self.way: Way | None = None
        if fusion is not None and fusion.kind == "features":
            assert fuser is not None
            self.head = nn.Linear(self.dim, len(self.classes))
        self.by_label = ByLabel([member.classes for member in members], self.classes) \
            if self.kind == "outputs" else None

    @property
    def name(self) -> str:
        """What it was built from, or the strategy that fused it."""
        return str(self.fusion) if self.fusion else next(self.each_member()).name

    @property
    def kind(self) -> str:
        """`"single"`, `"features"` or `"outputs"`; weights that were fused are a single network."""
        return self.fusion.kind if self.fusion and self.fuser is not None else "single"

    @property
    def image_size(self) -> int:
        return max(member.size for member in self.each_member())

    @property
    def in_chans(self) -> int:
        """The most channels that a member takes; grey and colour are made of each other."""
        return max(member.in_chans for member in self.each_member())

    @property
    def dim(self) -> int:
        """D of `embed`."""
        if self.kind == "features":
            return int(self.fuser.out_features)  # type: ignore[union-attr, arg-type]
        return sum(member.dim for member in self.each_member())

    @property
    def takes(self) -> str:
        """What the members give: `"vectors"`, `"tokens"` or `"maps"`."""
        return next(self.each_member()).gives

    @property
    def unpooled(self) -> bool:
        """Whether any member, or one inside it, gives tokens, maps or layers; what its network does
        with them afterwards is then idle."""
        return any(module.gives != "vectors" or module.layers or module.pool
                   for module in self.modules() if isinstance(module, Member))

    @property
    def splits(self) -> bool:
        """Whether the logits are `classify` of the members' features joined, so that features that
        were computed once can stand for the images."""
        return all(member.splits for member in self.each_member()) or self.kind == "features"

    @property
    def exits(self) -> bool:
        """Whether it leaves members out for images that are decided without them."""
        return bool(getattr(self.fuser, "exits", False))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def each_member(self) -> Iterator[Member]:
        """The members, typed."""
        return iter(list(self.members))  # type: ignore[arg-type]

    def trunk(self, images: Tensor | Pictures) -> tuple[Tensor, ...]:
        """Each member's features, pooled [B, Dᵢ], tokens [B, Nᵢ, Dᵢ] or maps [B, Dᵢ, hᵢ, wᵢ]: all
        that comes before what a fusion adds."""
        return self._each("features", images)

    def answers(self, images: Tensor | Pictures) -> tuple[Tensor, ...]:
        """Each member's own logits [B, classes], all in the order of the model's classes; their
        log-probabilities where they know different ones (zoo.labels)."""
        return self.in_order(self._each("__call__", images))

    def answers_and_features(self, images: Tensor | Pictures) -> tuple[tuple[Tensor, ...], ...]:
        """`answers` and `trunk`, of members whose logits split at the cost of one of them."""
        images = pictures(images)
        features = self.trunk(images)
        logits = [member.classify(part) if member.splits else member(images)
                  for member, part in zip(self.each_member(), features, strict=True)]
        return self.in_order(logits), features

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """The embedding [B, D] of the members' features."""
        if self.kind == "features":
            dtype = next(self.head.parameters()).dtype  # type: ignore[union-attr]
            parts = on_one_grid(features) if self.takes == "maps" else features
            return self.fuser([part.to(dtype) for part in parts])  # type: ignore[misc, no-any-return]
        return features[0] if len(features) == 1 else torch.cat(list(features), dim=1)

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, classes] of an embedding [B, D]."""
        if self.kind == "features":
            return self.head(embedding)  # type: ignore[misc, no-any-return]
        members = list(self.each_member())
        if self.kind == "single":
            return members[0].classify(embedding)
        parts = torch.split(embedding, [member.dim for member in members], dim=1)
        logits = [member.classify(part) for member, part in zip(members, parts, strict=True)]
        return self._decide(self.in_order(logits), parts)

    def embed(self, images: Tensor | Pictures) -> Tensor:
        """Fused features [B, D] of images [B, 3, H, W] on [0, 1]; the members' own, side by side,
        where their outputs are fused."""
        return self.join(self.trunk(images))

    def forward(self, images: Tensor | Pictures) -> Tensor:
        if self.kind == "single":
            return self._each("__call__", images)[0]
        if self.exits and not self.training:
            return self.fuser.run([partial(self._answer, number)  # type: ignore[union-attr, operator, no-any-return]
                                   for number in range(len(self.members))], pictures(images).images)
        if self.splits:
            return self.classify(self.embed(images))
        if getattr(self.fuser, "wants_features", False):
            return self._decide(*self.answers_and_features(images))
        return self._decide(self.answers(images), None)

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """What comes after the members' features."""
        if self.kind == "features":
            yield from self.fuser.parameters()  # type: ignore[union-attr]
            yield from self.head.parameters()  # type: ignore[union-attr]
        else:
            for member in self.each_member():
                yield from member.head_parameters()

    def reset_classes(self, classes: Sequence[str]) -> None:
        """Give the model a fresh, untrained head for these class names, on the model's device."""
        if self.kind == "outputs":
            raise FusionError(str(self.fusion), "the members of a fusion of outputs have heads of "
                              f"their own, for {len(self.classes)} other classes",
                              "Train each member for the new classes, then fuse again.")
        like = next(self.parameters())
        self.classes = tuple(classes)
        if self.kind == "features":
            self.head = nn.Linear(self.dim, len(self.classes)).to(like)
            return
        member = next(self.each_member())
        member.classes = self.classes
        member.net.reset_classifier(len(self.classes))  # type: ignore[operator]
        member.net.to(like.device, like.dtype)
        if member.blueprint:
            member.blueprint = replace(member.blueprint, num_classes=len(self.classes))

    def describe(self) -> dict[str, Any]:
        """Everything that is needed to build this model again, but its weights."""
        return {
            "classes": list(self.classes),
            "fusion": asdict(self.fusion) if self.fusion else None,
            "members": [member.describe() for member in self.each_member()],
        }

    def told(self, *, apart: bool = False) -> dict[str, Any]:
        """What the recipe of a model that was made with this one says of it, as JSON values: where
        it comes from, and the hash of its weights.

        apart: that model has no part that says how this one is built, so this does.
        """
        first, *others = [member.source for member in self.each_member()]
        shared = {key: value for key, value in first.items()
                  if all(key in other and other[key] == value for other in others)}
        told: dict[str, Any] = {"name": self.name, "classes": len(self.classes), **shared}
        # Where it came from does not tell whether it was trained since; only a hash does.
        net = next(self.each_member()).net if self.kind == "single" else self
        told["state_sha256"] = digest(net.state_dict())
        if others and "sources" not in self.recipe:  # nobody else says where its members come from
            told["members"] = [{"name": member.name, **member.source}
                               for member in self.each_member()]
        if self.recipe:
            told["recipe"] = copy.deepcopy(self.recipe)
        if apart and all(module.blueprint and module.preprocessing for module in self.modules()
                         if isinstance(module, Member) and not isinstance(module, Inner)):
            told["model"] = self.describe()
        return told

    def set_activation(self, name: str) -> None:
        """Put this activation in place of every other in the members' networks.

        Raises OptionError when there is none of that name, or nothing to replace.
        """
        for member in self.each_member():
            member.set_activation(name)

    def _answer(self, number: int, images: Tensor) -> Tensor:
        assert self.by_label is not None
        return self.by_label.one(number, self.members[number](images))

    def _each(self, act: str, images: Tensor | Pictures) -> tuple[Tensor, ...]:
        """What every member gives of the images by its method of this name."""
        members = list(self.each_member())
        shared = pictures(images)
        if self.way is not None and not self.training and not torch.is_grad_enabled():
            return tuple(self.way.run(members, act, shared))
        return tuple(getattr(member, act)(shared) for member in members)

    def _apply(self, fn: Any, recurse: bool = True) -> Model:
        self.way = None  # measured for the tensors that are replaced here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def in_order(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every member's own logits [B, its classes] as `answers` gives them."""
        return tuple(logits) if self.by_label is None else self.by_label(logits)

    def _decide(self, logits: Sequence[Tensor], features: Sequence[Tensor] | None) -> Tensor:
        return self.fuser(torch.stack(list(logits)), features)  # type: ignore[misc, no-any-return]


class Inner(Member):
    """A whole model as a member of another. It gives its embedding, which as tokens is one, and
    has no maps."""

    net: Model

    @property
    def in_chans(self) -> int:
        return self.net.in_chans

    @property
    def size(self) -> int:
        return self.net.image_size

    def features(self, images: Tensor | Pictures) -> Tensor:
        if self.gives == "maps":
            raise ZooError("it is a fused model and gives one vector")
        embedding = self.net.embed(images)
        return embedding[:, None] if self.gives == "tokens" else embedding

    def classify(self, features: Tensor) -> Tensor:
        return self.net.classify(features)

    def forward(self, images: Tensor | Pictures) -> Tensor:
        return self.net(images)  # type: ignore[no-any-return]

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.net.head_parameters()

    def set_activation(self, name: str) -> None:
        self.net.set_activation(name)

    def _describe_net(self) -> dict[str, Any]:
        return {"model": self.net.describe()}
