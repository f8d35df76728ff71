"""A mixture of experts: Shazeer et al. 2017, "Outrageously Large Neural Networks: The
Sparsely-Gated Mixture-of-Experts Layer", arXiv:1701.06538."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Moe(nn.Module):
    """Σₑ gₑ Eₑ(zₑ) over experts that see one member each, with the gates g = softmax of the k
    largest of W[z₁, z₂, …] / √ΣDᵢ, which sees all of them; the other gates are zero.

    An expert is a hidden layer with ReLU and a linear one, as in the paper. All are computed for
    every image: k chooses who speaks, and saves no time. The paper's noise on the gates and its
    loss that balances the experts' load are not there: a fusion of features adds no term to the
    loss. With a small k an expert can stay unused for that; with all of them, the default, none
    can. Each member's features are layer-normalised first.

    dims: D of each member. Takes their features z, each [B, Dᵢ], and gives [B, hidden]. Raises
    OptionError when an option is not positive or k is more than there are experts.

    Options:
        hidden: width of the experts, inside and of what they give
        experts: of each member
        k: how many experts, of all members', speak for an image; null is all of them
    """

    def __init__(
        self, dims: Sequence[int], *, hidden: int = 256, experts: int = 1, k: int | None = None
    ) -> None:
        super().__init__()
        if min(hidden, experts) < 1:
            raise OptionError("moe", f"hidden is {hidden} and experts {experts}, expected positive "
                              "numbers")
        count = len(dims) * experts
        if k is not None and not 1 <= k <= count:
            raise OptionError("moe", f"k is {k}, expected 1 to {count}, the experts of all "
                              "members, or null for all of them")
        self.out_features = hidden
        self.k = count if k is None else k
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        self.sees = [member for member in range(len(dims)) for _ in range(experts)]
        self.experts = nn.ModuleList(_expert(dims[member], hidden) for member in self.sees)
        self.gate = nn.Linear(sum(dims), count, bias=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        normed = [norm(one) for norm, one in zip(self.norms, features, strict=True)]
        said = torch.stack([expert(normed[member]) for expert, member
                            in zip(self.experts, self.sees, strict=True)], 1)  # (B, E, hidden)
        z = torch.cat(normed, 1)
        # As in attention: of so many features at once the gates would move faster than the experts.
        scores, chosen = (self.gate(z) / z.shape[1] ** 0.5).topk(self.k, 1)  # (B, k)
        spoken = said.gather(1, chosen[:, :, None].expand(-1, -1, said.shape[2]))
        mixed: Tensor = (scores.softmax(1)[:, :, None] * spoken).sum(1)
        return mixed  # (B, hidden)


def _expert(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden))
