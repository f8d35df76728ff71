"""How a member was built and how members were fused: all of a model that is not weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """How a member's network is built: everything but its weights, as JSON values.

    config: that of the timm folder that the network came from; it then says how to build it, and
    not the registry.
    """

    backbone: str
    num_classes: int
    in_chans: int = 3
    image_size: int | None = None
    activation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How the members were fused: the strategy's full name, its kind and all its options."""

    strategy: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.strategy
