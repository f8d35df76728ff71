"""What the core gives a fusion of weights beside tensors, for the kit's states: a small network
with these keys, images, labels and a score."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specs import FusionSpec


class Network(nn.Module):
    """A convolution, batch norm and a classifier: images [B, 3, H, W] to logits [B, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.bn(self.conv(images)).relu()  # (B, 4, H − 2, W − 2)
        return self.fc(self.scale * maps.mean((2, 3)))  # type: ignore[no-any-return]


def given(spec: FusionSpec, classes: int, device: torch.device) -> dict[str, Any]:
    """The keywords that the spec names, as `zoo.fuse` would pass them."""
    net = Network(classes).to(device).eval()
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 8, 8, generator=draw).to(device) for _ in range(2)]
    labels = [(torch.arange(8) % classes).to(device) for _ in batches]
    makers: dict[str, Callable[[], Any]] = {
        "module": lambda: net, "data": lambda: batches, "labels": lambda: labels,
        "score": lambda: _score_of(Network(classes).to(device), batches, labels),
        "graph": lambda: _graph(net, batches[0]),
    }
    return {name: make() for name, make in makers.items() if name in spec.uses | spec.can_use}


def _score_of(
    net: Network, batches: list[Tensor], labels: list[Tensor]
) -> Callable[[Mapping[str, Tensor]], float]:
    @torch.no_grad()
    def score(state: Mapping[str, Tensor]) -> float:
        net.load_state_dict(dict(state), strict=False)
        logits = net.eval()(torch.cat(batches))
        return -float(functional.cross_entropy(logits, torch.cat(labels)))

    return score


def _graph(net: Network, images: Tensor) -> Any:
    from zoo.fusion.align import trace

    return trace(net, images)
