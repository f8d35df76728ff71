"""Fisher merging against the Fisher information of a softmax regression, written out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.weights.fisher import fisher

State = dict[str, Tensor]


class Regression(nn.Module):
    """Logits of a linear layer, and a parameter that no answer depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


def states(count: int = 2) -> list[State]:
    draw = torch.Generator().manual_seed(0)
    return [{key: torch.randn(tensor.shape, generator=draw)
             for key, tensor in Regression().state_dict().items()} for _ in range(count)]


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(n, 4, generator=draw) for n in (7, 5)]


def fused(
    members: Sequence[State], share: Sequence[float] = (1.0, 1.0),
    data: Iterable[Tensor] | None = None, **options: Any,
) -> State:
    with torch.no_grad():
        return fisher(members, weights=dict.fromkeys(members[0], share),
                      module=Regression().eval().requires_grad_(False),
                      data=batches() if data is None else data, **options)


def information(state: State, truth: Tensor | None) -> State:
    """E (e_y − p)² x² over the answers' own distribution, or for these labels."""
    x = torch.cat(batches()).double()
    p = (x @ state["fc.weight"].double().T + state["fc.bias"]).softmax(1)  # (N, C)
    total = {"fc.weight": torch.zeros(3, 4).double(), "fc.bias": torch.zeros(3).double()}
    for image in range(len(x)):
        for answer in range(3):
            share = p[image, answer] if truth is None else float(truth[image] == answer)
            gradient = (torch.eye(3).double()[answer] - p[image]).square()
            total["fc.bias"] += share * gradient / len(x)
            total["fc.weight"] += share * gradient[:, None] * x[image].square() / len(x)
    return total


def expected(
    members: Sequence[State], found: Sequence[State], share: Sequence[float], *, normalise: bool
) -> State:
    norms = [torch.cat([part.flatten() for part in own.values()]).norm() if normalise else 1.0
             for own in found]
    result = {}
    for key in found[0]:
        parts = [w * own[key] / norm for w, own, norm in zip(share, found, norms, strict=True)]
        whole = torch.stack(parts)
        top = (whole * torch.stack([state[key] for state in members])).sum(0)
        result[key] = (top / whole.sum(0)).float()
    return result


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("source", ["expected", "true"])
def test_against_the_information_written_out(source: str, normalise: bool) -> None:
    members = states()
    truth = torch.arange(12) % 3
    result = fused(members, (1.0, 0.4), labels_from=source, labels=truth.split([7, 5]),
                   normalise=normalise)
    found = [information(state, truth if source == "true" else None) for state in members]
    wanted = expected(members, found, (1.0, 0.4), normalise=normalise)
    for key, tensor in wanted.items():
        torch.testing.assert_close(result[key], tensor, rtol=1e-4, atol=1e-5)
    mean = (members[0]["idle"] + 0.4 * members[1]["idle"]) / 1.4
    torch.testing.assert_close(result["idle"], mean)


def test_sampled_labels_come_from_the_answers() -> None:
    members = states()
    many = fused(members, data=batches() * 300)
    exact = fused(members, labels_from="expected")
    torch.testing.assert_close(many["fc.weight"], exact["fc.weight"], rtol=0.05, atol=0.05)
    one, same, other = (fused(members, seed=seed)["fc.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_floor_keeps_the_mean_where_nothing_depends_on_a_weight() -> None:
    members = states()
    data = [batch.clone() for batch in batches()]
    for batch in data:
        batch[:, 1] = 0
    result = fused(members, data=data)["fc.weight"]
    mean = (members[0]["fc.weight"] + members[1]["fc.weight"]) / 2
    torch.testing.assert_close(result[:, 1], mean[:, 1])
    assert not torch.allclose(result, mean, atol=1e-2)
    # A floor far above every entry makes all count the same.
    torch.testing.assert_close(fused(members, floor=1e9, normalise=False)["fc.weight"], mean)


def test_bad_values_and_missing_labels() -> None:
    with pytest.raises(FusionError, match=r"labels_from is 'true', and the data have no labels. "
                       r"Pass labelled data, or labels_from='sampled'"):
        fused(states(), labels_from="true")
    with pytest.raises(OptionError, match=r"fisher: floor is -1.0, expected 0 or more"):
        fused(states(), floor=-1.0)
    with pytest.raises(OptionError, match=r"fisher: the weights \(1.0, -1.0\) of 'idle' are "
                       "no shares"):
        fused(states(), (1.0, -1.0))
    with pytest.raises(DataError, match="no images to measure the Fisher information on"):
        fused(states(), data=[])
