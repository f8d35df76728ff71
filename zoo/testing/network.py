"""A small network whose states the checks fuse, and all that a strategy may ask to be given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.specs import FusionSpec

CLASSES = 4
SIDE = 8


class SmallNet(nn.Module):
    """A convolution, batch norm with its counter, a classifier and a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu().mean((2, 3))  # (B, 4)
        return self.fc(x) * self.scale  # type: ignore[no-any-return]


def state_of(seed: int) -> dict[str, Tensor]:
    """A state of SmallNet, with random values in all of it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "scale": normal(1)[0], "conv.weight": normal(4, 3, 3, 3),
        "bn.weight": normal(4), "bn.bias": normal(4),
        "bn.running_mean": normal(4), "bn.running_var": normal(4).square() + 0.1,
        "bn.num_batches_tracked": torch.tensor(10 + seed),
        "fc.weight": normal(CLASSES, 4), "fc.bias": normal(CLASSES),
    }


def given(spec: FusionSpec, device: torch.device) -> dict[str, Any]:
    """What the spec uses, or can use, beside a base."""
    net = SmallNet().to(device).eval()
    generator = torch.Generator().manual_seed(0)
    data = [torch.rand(16, 3, SIDE, SIDE, generator=generator).to(device) for _ in range(2)]
    labels = [(torch.arange(16) % CLASSES).to(device)] * 2

    @torch.no_grad()
    def score(candidate: Mapping[str, Tensor]) -> float:
        judged = SmallNet().to(device).eval()
        judged.load_state_dict(dict(candidate), strict=False)
        return -float(functional.cross_entropy(judged(data[0]), labels[0]))

    asked = (spec.uses | spec.can_use) - {"base"}
    found: dict[str, Any] = {"module": net, "data": data, "labels": labels, "score": score}
    if "graph" in asked:
        from zoo.fusion.align import trace

        found["graph"] = trace(net, data[0])
    return {name: found[name] for name in asked}
