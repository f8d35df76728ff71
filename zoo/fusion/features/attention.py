"""Pooling by multihead attention: Lee et al. 2019, "Set Transformer: A Framework for
Attention-based Permutation-Invariant Neural Networks", arXiv:1810.00825."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.errors import OptionError


class Attention(nn.Module):
    """Learned queries S gather what they attend to among the tokens Z of all members:
    LN(H + rFF(H)) with H = LN(S + Multihead(S, Z, Z)), the paper's PMA.

    Each member's tokens are layer-normalised and projected to one width first.

    dims: D of each member. Takes their tokens, each [B, Nᵢ, Dᵢ], and gives [B, queries · hidden].
    Raises OptionError when an option is not positive or hidden is no multiple of heads.

    Options:
        hidden: width of the projected tokens and of what a query gives
        heads: of the attention; hidden is a multiple of it
        queries: how many summaries of the tokens, side by side in the fused features
    """

    def __init__(
        self, dims: Sequence[int], *, hidden: int = 256, heads: int = 4, queries: int = 1
    ) -> None:
        super().__init__()
        if min(hidden, heads, queries) < 1 or hidden % heads:
            raise OptionError("attention", f"hidden is {hidden}, heads {heads} and queries "
                              f"{queries}, expected positive numbers, hidden a multiple of heads")
        self.out_features = queries * hidden
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden)) for dim in dims)
        self.queries = nn.Parameter(torch.empty(1, queries, hidden))
        nn.init.xavier_uniform_(self.queries)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.norm1 = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU())
        self.norm2 = nn.LayerNorm(hidden)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        z = torch.cat([project(one) for project, one
                       in zip(self.projections, tokens, strict=True)], 1)  # (B, ΣN, hidden)
        s = self.queries.expand(len(z), -1, -1)  # (B, queries, hidden)
        h = self.norm1(s + self.attention(s, z, z, need_weights=False)[0])
        pooled: Tensor = self.norm2(h + self.feed_forward(h))
        return pooled.flatten(1)  # (B, queries · hidden)
