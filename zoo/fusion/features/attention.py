"""Pooling by multihead attention: Lee et al. 2019, "Set Transformer: A Framework for
Attention-based Permutation-Invariant Neural Networks", arXiv:1810.00825."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError
from zoo.fusion.features.scaled import Scaled


class Attention(nn.Module):
    """Learned queries S gather what they attend to among the tokens Z of all members:
    LN(H + rFF(H)) with H = LN(S + Multihead(S, Z, Z)), the paper's PMA.

    Each member's tokens are layer-normalised and projected to one width first. Behind that every
    layer has weights that are scaled when they are used (zoo.fusion.features.scaled), for the sake
    of high learning rates.

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
        self.heads = heads
        self.query, self.key, self.value, self.out = (Scaled(hidden, hidden) for _ in range(4))
        self.norm1 = nn.LayerNorm(hidden)
        self.feed_forward = nn.Sequential(Scaled(hidden, hidden), nn.ReLU())
        self.norm2 = nn.LayerNorm(hidden)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        z = torch.cat([project(one) for project, one
                       in zip(self.projections, tokens, strict=True)], 1)  # (B, ΣN, hidden)
        s = self.queries.expand(z.shape[0], -1, -1)  # (B, queries, hidden)
        h = self.norm1(s + self._attend(s, z))
        pooled: Tensor = self.norm2(h + self.feed_forward(h))
        return pooled.flatten(1)  # (B, queries · hidden)

    def _attend(self, s: Tensor, z: Tensor) -> Tensor:
        """The paper's Multihead(S, Z, Z), (B, queries, hidden)."""
        query, key, value = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, x in
                             ((self.query, s), (self.key, z), (self.value, z)))  # (B, heads, N, d)
        gathered = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(gathered.transpose(1, 2).flatten(2))
        return out
