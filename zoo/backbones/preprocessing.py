"""What a network wants done to an image on [0, 1] before it looks at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from typing import Any

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input.

    mean: per channel, on [0, 1].
    std: per channel, on [0, 1].
    size: (height, width) in pixels.
    interpolation: bicubic, bilinear or nearest.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        for name in ("mean", "std", "size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.interpolation not in INTERPOLATIONS:  # timm also says random, lanczos, …
            object.__setattr__(self, "interpolation", "bicubic")

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Preprocessing:
        """From a timm pretrained_cfg."""
        default = cls()
        return cls(
            mean=tuple(config.get("mean") or default.mean),
            std=tuple(config.get("std") or default.std),
            size=tuple((config.get("input_size") or (3, *default.size))[-2:]),
            interpolation=config.get("interpolation") or default.interpolation,
        )

    def at(self, side: int) -> Preprocessing:
        """The same for squares of this side."""
        return replace(self, size=(side, side))

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for another number of channels: one gets the mean over the channels, more go
        round and round, as timm does with the weights of the first convolution."""
        if channels == len(self.mean):
            return self
        if channels == 1:
            average = (sum(self.mean) / len(self.mean),), (sum(self.std) / len(self.std),)
            return replace(self, mean=average[0], std=average[1])
        return replace(self, mean=tuple(islice(cycle(self.mean), channels)),
                       std=tuple(islice(cycle(self.std), channels)))

    def as_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self).items()}
