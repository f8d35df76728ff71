"""Which fusion is legal, and what a refusal says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion.planning import MemberFacts, check
from zoo.fusion.specs import SPECS

NAMED = {spec.name: spec for spec in SPECS}
SHAPES = {"conv1.weight": (64, 3, 7, 7), "pos_embed": (1, 17, 8), "fc.weight": (2, 8)}


def member(name: str = "a", **facts: Any) -> MemberFacts:
    known: dict[str, Any] = {"architecture": "timm/resnet18", "classes": ("cat", "dog"),
                             "shapes": SHAPES, "size": (64, 64)}
    return MemberFacts(name=name, **(known | facts))


def refusal(strategy: str, *members: MemberFacts, base: bool = True, data: bool = True) -> str:
    with pytest.raises(FusionError) as error:
        check(NAMED[strategy], members, has_base=base, has_data=data)
    return str(error.value).removeprefix(f"{strategy} cannot fuse these members: ")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_equal_members_may_be_fused_by_all(spec: Any) -> None:
    members = [member("a"), member("b", classes=("dog", "cat"))][:spec.members[1]]
    check(spec, members, has_base=True, has_data=True)


def test_unlike_members_may_be_fused_by_features_and_outputs() -> None:
    unlike = [member("a"), member("b", architecture="timm/vgg16", shapes={"x": (1,)}, size=(9, 9))]
    for name in ("concat", "gated", "mean", "weighted"):
        check(NAMED[name], unlike, has_base=False, has_data=True)
    other = [member("a"), member("b", classes=("bird",))]
    for name in ("concat", "gated"):
        check(NAMED[name], other, has_base=False, has_data=False)


def test_the_number_of_members() -> None:
    assert refusal("average", member()) == (
        "it takes at least 2, and 1 are given. Give it at least 2")
    assert refusal("concat", member()) == (
        "it takes at least 2, and 1 are given. Give it at least 2")
    assert refusal("wise_ft", member(), member()) == (
        "it takes exactly 1, and 2 are given. Give it exactly 1; 'average', 'task_arithmetic' "
        "and 'ties' take many")


def test_a_missing_base() -> None:
    assert refusal("ties", member(), member(), base=False) == (
        "it works on what each member changed in a common base, and none is given. Pass base=, "
        "the model that all members started from")


def test_missing_data() -> None:
    assert refusal("weighted", member(), member(), data=False) == (
        "it learns from held-out data, and none are given. Pass data=, labelled and kept apart "
        "from training and test")


ANY = ("'concat' and 'gated' (features) or 'mean' and 'weighted' (outputs) fuse members of any "
       "architecture")


def test_unlike_architectures() -> None:
    assert refusal("ties", member("x"), member("y", architecture="timm/vgg16")) == (
        "x is timm/resnet18 and y is timm/vgg16, and weights fuse only within one architecture. "
        + ANY)


def test_other_channels() -> None:
    grey = member("b", shapes=SHAPES | {"conv1.weight": (64, 1, 7, 7)})
    assert refusal("average", member(), grey) == (
        "tensor 'conv1.weight' is [64, 3, 7, 7] in a and [64, 1, 7, 7] in b. They take 3 and 1 "
        f"input channels: build both with the same in_chans. {ANY}")


def test_other_position_embeddings() -> None:
    large = member("b", shapes=SHAPES | {"pos_embed": (1, 37, 8)}, size=(96, 96))
    assert refusal("average", member(), large) == (
        "tensor 'pos_embed' is [1, 17, 8] in a and [1, 37, 8] in b. They take images of 64 × 64 "
        f"and 96 × 96 pixels: build both with the same image_size. {ANY}")
    convolutional = member("b", size=(96, 96))
    check(NAMED["average"], [member(), convolutional], has_base=False, has_data=False)


def test_other_tensors() -> None:
    with pytest.raises(ShapeMismatch) as error:
        check(NAMED["average"], [member(), member("b", shapes={"conv1.weight": (64, 3, 7, 7)})],
              has_base=False, has_data=False)
    assert error.value.key == "pos_embed"
    assert "'pos_embed' is [1, 17, 8] in a and missing in b; so do 'fc.weight' differ. " + ANY \
        in str(error.value)


def test_other_labels() -> None:
    check(NAMED["average"], [member(), member("b", classes=("cat", "cow"))], has_base=False,
          has_data=False)
    check(NAMED["mean"], [member(), member("b", classes=("cat", "cow"))], has_base=False,
          has_data=False)
    assert refusal("fisher", member(), member("b", classes=("cat", "cow"))) == (
        "their labels differ: only a knows 'dog'; only b knows 'cow'. 'concat' and 'gated' "
        "(features) learn a new classifier for members of any classes; 'mean' and 'stacking' "
        "(outputs), and of weights 'average', 'ties' and what else needs tensors alone, join them "
        "by label name")


def test_a_fusion_of_weights_that_learns_wants_data() -> None:
    for asked in ("data", "labels", "score"):
        asking = replace(NAMED["average"], uses=frozenset({asked}))
        check(asking, [member("a"), member("b")], has_base=False, has_data=True)
        with pytest.raises(FusionError, match="it learns from held-out data, and none are given"):
            check(asking, [member("a"), member("b")], has_base=False, has_data=False)
