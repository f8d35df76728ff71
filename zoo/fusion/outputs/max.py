"""The max rule: Kittler et al. 1998, "On combining classifiers", doi:10.1109/34.667881."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.fusion.outputs.pool import Pool


class Max(Pool):
    """The largest probability that any member gives a class, normalised: whoever is surest decides.

    members: M. num_classes: C. Takes logits [M, B, C] and gives log-probabilities [B, C].

    Options:
        calibrate: give each member a temperature, found on held-out data; without, a member that
            is too sure of itself decides
        recalibrate: give the pool a temperature, found on held-out data
    """

    def __init__(
        self, members: int, num_classes: int, *, calibrate: bool = False, recalibrate: bool = False
    ) -> None:
        super().__init__("max", members, num_classes, calibrate=calibrate, recalibrate=recalibrate)

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        return logits.log_softmax(2).amax(0).log_softmax(1)
