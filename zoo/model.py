"""What zoo builds, trains, fuses and saves: images on [0, 1] in, logits out.

A `Model` is one or more `Member`s. A single network, or one made by fusing weights, is a model of
one member; features or outputs of several members meet in a `fuser`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.backbones import Preprocessing
from zoo.backbones.activations import swap_activations
from zoo.backbones.layers import chosen
from zoo.backbones.pixels import as_channels, want_images
from zoo.backbones.semantics import (
    classifier_parameters,
    classify,
    maps,
    on_one_grid,
    pooled_features,
    tokens,
)
from zoo.blueprints import Blueprint, Fusion
from zoo.errors import FusionError, ZooError
from zoo.labels import ByLabel


class Member(nn.Module):
    """One network inside a model, with its own resizing and normalisation.

    net: timm's semantics, or a whole Model. name: what it was built from. classes: what its own
    logits count. dim: D of what it gives. splits: whether its logits are its classifier's
    answer to its pooled features; a few networks have more in between. gives: what a fusion gets of
    it, `"vectors"` (pooled features), `"tokens"` or `"maps"`. layers, pool: of which layers, and
    how pooled; by default of what comes before the network's own pooling, and by that.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        classes: Sequence[str],
        dim: int,
        splits: bool = True,
        gives: str = "vectors",
        layers: Sequence[str] = (),
        pool: str | None = None,
        preprocessing: Preprocessing | None = None,
        blueprint: Blueprint | None = None,
        norms: str = "frozen",
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.classes = tuple(classes)
        self.dim = dim
        self.splits = splits
        self.gives = gives
        self.layers = tuple(layers)
        self.pool = pool
        self.preprocessing = preprocessing
        self.blueprint = blueprint
        self.norms = norms
        self.source = dict(source or {})
        self.register_buffer("_follows", torch.empty(0), persistent=False)
        self._follows: Tensor  # its dtype is the one that the network computes in
        self.mean: Tensor
        self.std: Tensor
        self._set_statistics()

    @property
    def in_chans(self) -> int:
        if isinstance(self.net, Model):
            return self.net.in_chans
        return self.blueprint.in_chans if self.blueprint else 3

    @property
    def giving(self) -> dict[str, Any]:
        """All that says which features a fusion gets of the network, as JSON values."""
        return {"gives": self.gives, "layers": list(self.layers), "pool": self.pool}

    @property
    def size(self) -> int:
        """The side of the square that this member looks at, in pixels."""
        if isinstance(self.net, Model):
            return self.net.image_size
        assert self.preprocessing is not None
        return max(self.preprocessing.size)

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] on [0, 1] as the network wants them: its channels, its size,
        its mean and standard deviation."""
        want_images(images)
        x = as_channels(images, self.in_chans).float()  # (B, C, H, W)
        preprocessing = self.preprocessing
        assert preprocessing is not None
        if tuple(x.shape[-2:]) != preprocessing.size:
            smooth = preprocessing.interpolation in ("bicubic", "bilinear")
            x = functional.interpolate(
                x, preprocessing.size, mode=preprocessing.interpolation, antialias=smooth,
            ).clamp(0, 1)
        x = (x - self.mean) / self.std
        return x.to(self._follows.dtype)

    def features(self, images: Tensor) -> Tensor:
        """What the member gives of images [B, C, H, W] on [0, 1]: pooled features [B, D], tokens
        [B, N, D] or maps [B, D, h, w]. A model inside gives its embedding, or that as one token.
        Raises ZooError where there are no maps."""
        if isinstance(self.net, Model):
            if self.gives == "maps":
                raise ZooError("it is a fused model and gives one vector")
            embedding = self.net.embed(images)
            return embedding[:, None] if self.gives == "tokens" else embedding
        x = self.prepare(images)
        if self.layers or self.pool:
            return chosen(self.net, x, self.gives, self.layers, self.pool)
        give = {"vectors": pooled_features, "tokens": tokens, "maps": maps}[self.gives]
        return give(self.net, x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of pooled features [B, D]. Raises ZooError where there is more
        between the two than a classifier."""
        if isinstance(self.net, Model):
            return self.net.classify(features)
        if not self.splits:
            raise ZooError(f"the logits of {self.name} are not its classifier's answer to its "
                           "pooled features: give the model images, or use a method that does")
        return classify(self.net, features.to(self._follows.dtype))

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.net, Model):
            return self.net(images)  # type: ignore[no-any-return]
        return self.net(self.prepare(images))  # type: ignore[no-any-return]

    def drop_head(self) -> None:
        """Take the classifier off: a fusion of features has its own, and this one would only be
        carried along."""
        assert self.blueprint is not None
        self.net.reset_classifier(0)  # type: ignore[operator]
        self.blueprint = replace(self.blueprint, num_classes=0)
        self.classes = ()

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the classifier alone."""
        if isinstance(self.net, Model):
            yield from self.net.head_parameters()
        else:
            yield from classifier_parameters(self.net)

    def _set_statistics(self) -> None:
        if self.preprocessing is None:
            return
        channels = self.preprocessing.for_channels(self.in_chans)
        for name, values in (("mean", channels.mean), ("std", channels.std)):
            tensor = torch.tensor(values, dtype=torch.float32, device=self._follows.device)
            self.register_buffer(name, tensor.view(1, -1, 1, 1), persistent=False)

    def follow(self) -> None:
        """Compute in the dtype of the network's state, after this was put in place."""
        dtypes = [tensor.dtype for tensor in self.net.state_dict().values()
                  if tensor.is_floating_point()]
        if len(set(dtypes)) == 1:
            self.to(dtypes[0])  # with the buffers that are computed and never saved
        else:
            self._follows = self._follows.to(dtypes[0])

    def _apply(self, fn: Any, recurse: bool = True) -> Member:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._set_statistics()  # stays float32: normalisation must not lose bits to .bfloat16()
        return self


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

    def trunk(self, images: Tensor) -> tuple[Tensor, ...]:
        """Each member's features, pooled [B, Dᵢ], tokens [B, Nᵢ, Dᵢ] or maps [B, Dᵢ, hᵢ, wᵢ]: all
        that comes before what a fusion adds."""
        return tuple(member.features(images) for member in self.each_member())

    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Each member's own logits [B, classes], all in the order of the model's classes; their
        log-probabilities where they know different ones (zoo.labels)."""
        return self.in_order([member(images) for member in self.each_member()])

    def answers_and_features(self, images: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """`answers` and `trunk`, of members whose logits split at the cost of one of them."""
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

    def embed(self, images: Tensor) -> Tensor:
        """Fused features [B, D] of images [B, 3, H, W] on [0, 1]; the members' own, side by side,
        where their outputs are fused."""
        return self.join(self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        if self.kind == "single":
            return next(self.each_member())(images)  # type: ignore[no-any-return]
        if self.exits and not self.training:
            return self.fuser.run([partial(self._answer, number)  # type: ignore[union-attr, operator, no-any-return]
                                   for number in range(len(self.members))], images)
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
            "members": [_describe(member) for member in self.each_member()],
        }

    def set_activation(self, name: str) -> None:
        """Put this activation in place of every other in the members' networks.

        Raises OptionError when there is none of that name, or nothing to replace.
        """
        for member in self.each_member():
            if isinstance(member.net, Model):
                member.net.set_activation(name)
                continue
            swap_activations(member.net, name)
            if member.blueprint:
                member.blueprint = replace(member.blueprint, activation=name)

    def _answer(self, number: int, images: Tensor) -> Tensor:
        assert self.by_label is not None
        return self.by_label.one(number, self.members[number](images))

    def in_order(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Every member's own logits [B, its classes] as `answers` gives them."""
        return tuple(logits) if self.by_label is None else self.by_label(logits)

    def _decide(self, logits: Sequence[Tensor], features: Sequence[Tensor] | None) -> Tensor:
        return self.fuser(torch.stack(list(logits)), features)  # type: ignore[misc, no-any-return]


def _describe(member: Member) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": member.name, "classes": list(member.classes), "dim": member.dim,
        "splits": member.splits, **member.giving, "norms": member.norms,
        "source": member.source,
    }
    if isinstance(member.net, Model):
        described["model"] = member.net.describe()
    else:
        assert member.blueprint is not None
        assert member.preprocessing is not None
        described["build"] = member.blueprint.as_dict()
        described["preprocessing"] = member.preprocessing.as_dict()
    return described
