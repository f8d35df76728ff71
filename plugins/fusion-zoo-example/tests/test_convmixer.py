"""ConvMixer as a network of zoo: its options, sizes and head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from zoo.errors import OptionError, WeightsError
from zoo_example.convmixer import build


def test_it_learns() -> None:
    model = zoo.backbone("example/convmixer", num_classes=10, seed=0, image_size=8,
                         patch=1)
    zoo.transfer(model, "zoo/digits", epochs=4, lr=3e-3)
    assert zoo.evaluate(model, "zoo/digits").accuracy > 0.9


def test_options_make_it_larger() -> None:
    net = build(num_classes=3, pretrained=False, in_chans=1, image_size=24, width=8, depth=3,
                kernel=3, patch=4)
    assert len(net.blocks) == 3
    assert net.preprocessing.size == (24, 24)
    assert len(net.preprocessing.mean) == 1
    assert net.forward_features(torch.rand(2, 1, 24, 24)).shape == (2, 8, 6, 6)
    assert net(torch.rand(2, 1, 24, 24)).shape == (2, 3)


def test_no_classes_leave_the_features() -> None:
    net = build(num_classes=0, pretrained=False).eval()
    x = torch.rand(2, 3, 32, 32)
    features = net.forward_head(net.forward_features(x), pre_logits=True)
    assert torch.equal(net(x), features)


def test_it_has_no_weights_to_give() -> None:
    with pytest.raises(WeightsError, match="no published weights"):
        zoo.backbone("example/convmixer", pretrained=True)


@pytest.mark.parametrize("options", [
    {"width": 0}, {"depth": 0}, {"kernel": 0}, {"patch": 0}, {"image_size": 1}])
def test_what_cannot_be_built_is_refused(options: dict[str, Any]) -> None:
    name = "image_size 1," if "image_size" in options else f"{next(iter(options))} "
    with pytest.raises(OptionError, match=name):
        build(num_classes=10, pretrained=False, **options)
