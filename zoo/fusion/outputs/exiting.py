"""Leave later members out for images that are decided: the members run in their order, each on
the images that are still open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.outputs.pool import Pool

Exit = Literal["none", "exact", "confident"]

# What the sums of float32 probabilities are off by, with room.
_ROUNDING = 1e-5


class Exiting(Pool):
    """A pool that may stop early. exit: `"exact"` stops when no answer of the members that are left
    could change the class that leads, `"confident"` when the pool of those that ran gives its
    class at least the probability `confidence`, `"none"` never. A strategy writes `lead`.
    """

    def __init__(
        self, strategy: str, members: int, num_classes: int, *, calibrate: bool = False,
        recalibrate: bool = False, exit: Exit = "none", confidence: float = 0.9,
    ) -> None:
        super().__init__(strategy, members, num_classes, calibrate=calibrate,
                         recalibrate=recalibrate)
        if exit not in get_args(Exit):
            raise OptionError(strategy, f"exit is {exit!r}, expected {' or '.join(get_args(Exit))}")
        if not 0 < confidence <= 1:
            raise OptionError(strategy, f"confidence is {confidence:g}, expected a probability in "
                              "(0, 1]")
        self.exit = exit
        self.confidence = confidence

    @property
    def exits(self) -> bool:
        return self.exit != "none"

    def lead(self, logits: Tensor) -> tuple[Tensor, float]:
        """The points [B, C] that each class has from the first m members, whose calibrated logits
        are [m, B, C], and how far the others could change the distance of any two."""
        raise NotImplementedError

    def run(self, answers: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> Tensor:
        """Log-probabilities [B, C] of images [B, …], each pooled over the members that ran on it.

        answers: of each member, from images to logits.
        """
        rows = torch.arange(len(images), device=images.device)  # of the images that are open
        done: list[tuple[Tensor, Tensor]] = []
        logits: Tensor | None = None  # (m, open, C)
        for answer in answers:
            fresh = answer(images if len(rows) == len(images) else images[rows])[None]
            logits = fresh if logits is None else torch.cat([logits, fresh])
            if len(logits) == len(answers):
                break
            decided = self.decided(logits)
            if decided.any():
                done.append((rows[decided], self(logits[:, decided])))
                rows, logits = rows[~decided], logits[:, ~decided]
            if not len(rows):
                break
        assert logits is not None
        done.append((rows, self(logits)))
        order = torch.cat([places for places, _ in done]).argsort()
        return torch.cat([pooled for _, pooled in done])[order]

    def decided(self, logits: Tensor) -> Tensor:
        """Which images are done [B] after the first m members, of logits [m, B, C]."""
        if self.exit == "confident":
            pooled: Tensor = self(logits)
            return pooled.amax(1).exp() >= self.confidence
        logits = logits.float()
        if self.calibrates:
            logits = logits / self.temperatures.float()[:len(logits), None, None]
        points, change = self.lead(logits)
        if points.shape[1] < 2:
            return torch.ones(len(points), dtype=torch.bool, device=points.device)
        first, second = points.topk(2, dim=1).values.unbind(1)
        return first - second > change + _ROUNDING
