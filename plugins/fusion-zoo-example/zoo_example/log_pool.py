"""Pool, then calibrate: Rahaman & Thiery 2021, "Uncertainty quantification and deep ensembles",
arXiv:2007.08792."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import NotFitted


class LogPool(nn.Module):
    """softmax(s · mean of log pᵢ): the members' geometric mean, with one sharpness s for all,
    fitted by NLL on held-out data.

    members: how many. num_classes: C. Takes logits [M, B, C] and gives log-probabilities [B, C],
    in float32. Raises NotFitted when used before `fit`, which `zoo.fuse(…, data=)` calls.
    """

    sharpness: Tensor
    fitted: Tensor

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()
        # What is learnt is in buffers, so that it is saved with the model.
        self.register_buffer("sharpness", torch.ones(()))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # `fitted`, where torch.compile can see it
        self.register_load_state_dict_post_hook(_read_fitted)  # type: ignore[no-untyped-call]

    def forward(self, logits: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        if not self._ready:
            raise NotFitted("log_pool has not been fitted to held-out data; make the model with "
                            "zoo.fuse(…, 'example/log_pool', data=…)")
        pooled = logits.float().log_softmax(2).mean(0)  # (B, C)
        return (self.sharpness.float() * pooled).log_softmax(1)

    def fit(self, logits: Tensor, labels: Tensor) -> None:
        """Find the likeliest sharpness from 1/100 to 100. logits: [M, N, C]. labels: integers [N]
        in [0, C)."""
        pooled = logits.cpu().double().log_softmax(2).mean(0)  # (N, C)
        true = pooled.gather(1, labels.cpu()[:, None])[:, 0]
        low, high = 0.01, 100.0
        for _ in range(40):
            middle = (low * high) ** 0.5
            expected = ((middle * pooled).softmax(1) * pooled).sum(1)
            # The slope of the NLL, which is convex in the sharpness.
            if (expected - true).mean() < 0:
                low = middle
            else:
                high = middle
        self.sharpness.fill_(middle)
        self.fitted.fill_(True)
        self._ready = True


def _read_fitted(module: Any, incompatible: Any) -> None:
    module._ready = bool(module.fitted)
