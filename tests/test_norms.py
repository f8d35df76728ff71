"""Batch norm after a fusion of weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.fusion.norms import norm_keys, pooled_variance, reestimate


class NormWithDropout(nn.BatchNorm1d):
    """A batch norm that holds its dropout, as timm's norm-and-activation layers do."""

    def __init__(self) -> None:
        super().__init__(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, features: Tensor) -> Tensor:
        return self.drop(super().forward(features))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), NormWithDropout(),
                         nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)))


def batches(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, generator=generator) * 2 + 1 for _ in range(count)]


def test_norm_keys_are_means_and_variances() -> None:
    assert norm_keys(network()) == {"2.running_mean", "2.running_var",
                                    "3.1.running_mean", "3.1.running_var"}
    shared = nn.BatchNorm1d(2)
    assert len(norm_keys(nn.Sequential(shared, shared))) == 4
    assert norm_keys(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))) == set()


def test_pooled_variance_is_that_of_the_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(count, 3, generator=generator, dtype=torch.float64) * scale + shift
             for count, scale, shift in ((100, 1.0, 0.0), (300, 2.0, 5.0))]
    pooled = pooled_variance([part.mean(0) for part in parts],
                             [part.var(0, correction=0) for part in parts], [100, 300])
    torch.testing.assert_close(pooled, torch.cat(parts).var(0, correction=0))


def test_pooled_variance_of_copies_is_theirs_and_halves_do_not_overflow() -> None:
    mean, variance = torch.tensor([300.0]).half(), torch.tensor([60_000.0]).half()
    pooled = pooled_variance([mean] * 3, [variance] * 3, [1, 1, 1])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, variance.float())


def test_reestimated_statistics_are_the_mean_over_batches() -> None:
    net, data = network(), batches()
    net[2].running_mean.fill_(50)
    net[2].num_batches_tracked.fill_(7)
    reestimate(net, data)
    with torch.no_grad():
        features = [net[0](batch) for batch in data]  # dropout must have been off
    torch.testing.assert_close(net[2].running_mean, torch.stack([one.mean(0) for one in features])
                               .mean(0))
    torch.testing.assert_close(net[2].running_var, torch.stack([one.var(0) for one in features])
                               .mean(0))
    assert net[2].num_batches_tracked.item() == len(data)


def test_the_second_norm_sees_the_first_in_training_mode_without_its_dropout() -> None:
    net, data = network(), batches()
    reestimate(net, data)
    with torch.no_grad():
        normed = [nn.functional.batch_norm(net[0](batch), None, None, net[2].weight, net[2].bias,
                                           training=True).relu() for batch in data]
    torch.testing.assert_close(net[3][1].running_mean, torch.stack([one.mean(0) for one in normed])
                               .mean(0))


def test_modes_momenta_weights_and_gradients_are_left_as_they_were() -> None:
    net = network().eval()
    net[3][0].train()
    net[2].momentum = 0.3
    modes = [module.training for module in net.modules()]
    weights = [parameter.clone() for parameter in net.parameters()]
    reestimate(net, batches())
    assert [module.training for module in net.modules()] == modes
    assert [net[2].momentum, net[3][1].momentum] == [0.3, 0.1]
    assert all(torch.equal(*pair) for pair in zip(weights, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_network_without_running_statistics_reads_no_data() -> None:
    def unread() -> Iterator[Tensor]:
        raise AssertionError("a batch was read")
        yield torch.ones(1)

    reestimate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)),
               unread())


def test_an_error_brings_the_old_statistics_back() -> None:
    def broken() -> Iterator[Tensor]:
        yield batches()[0]
        raise OSError("the disk is gone")

    net = network().train()
    reestimate(net, batches())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        reestimate(net, broken())
    with pytest.raises(DataError, match="there is no batch to estimate batch norm's statistics"):
        reestimate(net, [])
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training
    assert net[2].momentum == 0.1
