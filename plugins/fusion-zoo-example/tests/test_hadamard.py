"""The Hadamard product: members of different sizes meet in one product."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.errors import OptionError
from zoo_example.hadamard import Hadamard


def test_it_is_the_product_of_the_projections() -> None:
    fuser = Hadamard([3, 5], rank=4)
    one, other = torch.randn(2, 3), torch.randn(2, 5)
    first, second = fuser.projections
    with torch.no_grad():
        expected = first(one).tanh() * second(other).tanh()
        assert torch.allclose(fuser([one, other]), expected)


def test_a_silent_member_silences_the_product() -> None:
    fuser = Hadamard([3, 5], rank=4)
    torch.nn.init.zeros_(fuser.projections[1].bias)
    with torch.no_grad():
        assert not fuser([torch.randn(2, 3), torch.zeros(2, 5)]).any()


def test_networks_of_different_kinds_train_together() -> None:
    members = [zoo.backbone(name, num_classes=10, image_size=8, seed=0)
               for name in ("example/convmixer", "zoo/mnist_cnn")]
    model = zoo.fuse(members, "example/hadamard", rank=64)
    zoo.transfer(model, "zoo/digits", epochs=4, lr=3e-3)
    assert zoo.evaluate(model, "zoo/digits").accuracy > 0.9


def test_a_rank_is_positive() -> None:
    with pytest.raises(OptionError, match="rank is 0, expected a positive number"):
        Hadamard([3, 5], rank=0)
