"""The logarithmic opinion pool: Genest and Zidek 1986, "Combining probability distributions: a
critique and an annotated bibliography"; of networks, Hinton 2002, doi:10.1162/089976602760128018.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from zoo.fusion.outputs.pool import Pool, member_weights


class Geometric(Pool):
    """∏ᵢ softmax(zᵢ)^wᵢ, normalised: a class that one member excludes is excluded.

    members: M. num_classes: C. Takes logits z [M, B, C] and gives log-probabilities [B, C].

    Options:
        weights: one number per member, scaled to add up to one; by default all count alike
        calibrate: give each member a temperature, found on held-out data
        recalibrate: give the pool a temperature, found on held-out data
    """

    shares: Tensor

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        weights: list[float] | None = None,
        calibrate: bool = False,
        recalibrate: bool = False,
    ) -> None:
        super().__init__("geometric", members, num_classes, calibrate=calibrate,
                         recalibrate=recalibrate)
        given = member_weights("geometric", weights, members)
        self.register_buffer("shares", given / given.sum(), persistent=False)

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        shares = self.shares.float()[:, None, None]
        return (shares * logits.log_softmax(2)).sum(0).log_softmax(1)
