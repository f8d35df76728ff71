"""The plain ensemble: Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty
estimation using deep ensembles", arXiv:1612.01474."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from zoo.errors import OptionError
from zoo.fusion.outputs.exiting import Exiting
from zoo.fusion.outputs.pool import mean_of_probabilities


class Mean(Exiting):
    """The mean of the members' probabilities (or of their logits, which is another thing: a
    member that is sure of itself counts for more).

    members: how many. num_classes: C. Takes logits [M, B, C] and gives log-probabilities
    [B, C], in float32. Raises OptionError for another kind of mean.

    Options:
        of: what is averaged, "probabilities" or "logits"
        calibrate: give each member a temperature, found on held-out data
        recalibrate: give the mean a temperature, found on held-out data
        exit: leave the later members out for an image whose answer they cannot change ("exact"), or
            of which the first are sure ("confident"); "none" runs all
        confidence: for exit "confident", the probability that is enough, in (0, 1]
    """

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        of: Literal["probabilities", "logits"] = "probabilities",
        calibrate: bool = False,
        recalibrate: bool = False,
        exit: Literal["none", "exact", "confident"] = "none",
        confidence: float = 0.9,
    ) -> None:
        super().__init__("mean", members, num_classes, calibrate=calibrate,
                         recalibrate=recalibrate, exit=exit, confidence=confidence)
        if of not in ("probabilities", "logits"):
            raise OptionError("mean", f"of is {of!r}, expected 'probabilities' or 'logits'")
        if of == "logits" and exit == "exact":
            raise OptionError("mean", "exit is 'exact' and of is 'logits', which have no bound; "
                              "take exit 'confident', or the mean of probabilities")
        self.of = of

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        if self.of == "logits":
            return logits.mean(0).log_softmax(1)
        return mean_of_probabilities(logits)  # (B, C)

    def lead(self, logits: Tensor) -> tuple[Tensor, float]:
        return logits.softmax(2).sum(0), float(self.members - len(logits))
