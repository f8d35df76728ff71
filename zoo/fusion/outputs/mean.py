"""The plain ensemble: Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty
estimation using deep ensembles", arXiv:1612.01474."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from zoo.errors import OptionError


class Mean(nn.Module):
    """The mean of the members' probabilities (or of their logits, which is another thing: a
    member that is sure of itself counts for more).

    members: how many. num_classes: C. Takes logits [M, B, C] and gives log-probabilities
    [B, C], in float32. Raises OptionError for another kind of mean.

    Options:
        of: what is averaged, "probabilities" or "logits"
    """

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        of: Literal["probabilities", "logits"] = "probabilities",
    ) -> None:
        super().__init__()
        if of not in ("probabilities", "logits"):
            raise OptionError("mean", f"of is {of!r}, expected 'probabilities' or 'logits'")
        self.of = of

    def forward(self, logits: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        logits = logits.float()
        if self.of == "logits":
            return logits.mean(0).log_softmax(1)
        return logits.log_softmax(2).logsumexp(0) - math.log(len(logits))  # (B, C)
