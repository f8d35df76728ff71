"""A network inside a model: images on [0, 1] in, its own resizing and normalisation inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.backbones import Preprocessing
from zoo.backbones.activations import swap_activations
from zoo.backbones.layers import chosen
from zoo.backbones.pixels import Pictures, pictures
from zoo.backbones.semantics import classifier_parameters, classify, maps, pooled_features, tokens
from zoo.blueprints import Blueprint
from zoo.errors import ZooError


class Member(nn.Module):
    """One network inside a model, with its own resizing and normalisation.

    net: timm's semantics. name: what it was built from. classes: what its own
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
        return self.blueprint.in_chans if self.blueprint else 3

    @property
    def giving(self) -> dict[str, Any]:
        """All that says which features a fusion gets of the network, as JSON values."""
        return {"gives": self.gives, "layers": list(self.layers), "pool": self.pool}

    @property
    def size(self) -> int:
        """The side of the square that this member looks at, in pixels."""
        assert self.preprocessing is not None
        return max(self.preprocessing.size)

    def prepare(self, images: Tensor | Pictures) -> Tensor:
        """Images [B, C, H, W] on [0, 1] as the network wants them: its channels, its size,
        its mean and standard deviation."""
        preprocessing = self.preprocessing
        assert preprocessing is not None
        x = pictures(images).at(self.in_chans, preprocessing.size, preprocessing.interpolation)
        x = (x - self.mean) / self.std
        return x.to(self._follows.dtype)

    def features(self, images: Tensor | Pictures) -> Tensor:
        """What the member gives of images [B, C, H, W] on [0, 1]: pooled features [B, D], tokens
        [B, N, D] or maps [B, D, h, w]. Raises ZooError where there are none."""
        x = self.prepare(images)
        if self.layers or self.pool:
            return chosen(self.net, x, self.gives, self.layers, self.pool)
        give = {"vectors": pooled_features, "tokens": tokens, "maps": maps}[self.gives]
        return give(self.net, x)

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of pooled features [B, D]. Raises ZooError where there is more
        between the two than a classifier."""
        if not self.splits:
            raise ZooError(f"the logits of {self.name} are not its classifier's answer to its "
                           "pooled features: give the model images, or use a method that does")
        return classify(self.net, features.to(self._follows.dtype))

    def forward(self, images: Tensor | Pictures) -> Tensor:
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
        yield from classifier_parameters(self.net)

    def set_activation(self, name: str) -> None:
        """Put this activation in place of every other in the network. Raises OptionError when
        there is none of that name, or nothing to replace."""
        swap_activations(self.net, name)
        if self.blueprint:
            self.blueprint = replace(self.blueprint, activation=name)

    def describe(self) -> dict[str, Any]:
        """Everything that is needed to build this member again, but its weights."""
        return {
            "name": self.name, "classes": list(self.classes), "dim": self.dim,
            "splits": self.splits, **self.giving, "norms": self.norms, "source": self.source,
            **self._describe_net(),
        }

    def _describe_net(self) -> dict[str, Any]:
        assert self.blueprint is not None
        assert self.preprocessing is not None
        return {"build": self.blueprint.as_dict(),
                "preprocessing": self.preprocessing.as_dict()}

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
