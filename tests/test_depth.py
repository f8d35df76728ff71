"""How deep a tensor lies, read from keys of all families."""

from __future__ import annotations

import doctest

import pytest
import timm
import torch

from zoo.fusion import depth
from zoo.fusion.depth import depths


@pytest.mark.parametrize(("name", "blocks", "before", "after"), [
    ("resnet18", 8, "conv1.weight", "fc.weight"),
    ("vgg11_bn", 16, None, "head.fc.weight"),
    ("convnext_atto", 15, "stem.0.weight", "head.fc.weight"),
    ("tf_efficientnet_lite0", 16, "conv_stem.weight", "classifier.weight"),
    ("vit_tiny_patch16_224", 12, "cls_token", "head.weight"),
    ("inception_v3", 11, "Conv2d_1a_3x3.conv.weight", "fc.weight"),
    ("densenet121", 61, "features.conv0.weight", "classifier.weight"),
    ("swin_tiny_patch4_window7_224", 15, "patch_embed.norm.weight", "head.fc.weight"),
    ("regnetx_002", 13, "stem.conv.weight", "head.fc.weight"),
])
def test_depth_follows_the_layers_of_timms_families(
    name: str, blocks: int, before: str | None, after: str
) -> None:
    with torch.device("meta"):
        keys = list(timm.create_model(name).state_dict())
    found = depths(keys)
    inner = sorted(set(found.values()))
    assert len(inner) == blocks
    assert inner == pytest.approx([place / (blocks - 1) for place in range(blocks)])
    assert found[after] == 1
    if before:
        assert found[before] == 0
    assert depths(reversed(keys)) == found  # files are in no order
    if name != "densenet121":
        return
    order = ["features.denseblock1.denselayer6.conv2.weight", "features.transition1.conv.weight",
             "features.denseblock2.denselayer1.conv1.weight", "features.denseblock2.denselayer10."
             "conv1.weight", "features.norm5.weight"]
    assert [found[key] for key in order] == sorted(found[key] for key in order)


def test_language_models_and_plain_stacks() -> None:
    llama = depths([f"model.layers.{n}.mlp.up_proj.weight" for n in range(12)]
                   + ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
    assert [llama[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(12)] == pytest.approx(
        [n / 11 for n in range(12)])
    assert (llama["model.embed_tokens.weight"], llama["lm_head.weight"]) == (0, 1)
    assert list(depths(["0.weight", "2.weight", "4.bias"]).values()) == [0, 0.5, 1]
    assert list(depths(["fc1.weight", "fc2.weight"]).values()) == [0.5, 0.5]


def test_the_docstring() -> None:
    assert doctest.testmod(depth).failed == 0
