"""Frozen layers are run once, wherever a network can be entered after them; the same comes out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo import features
from zoo.datasets import ImageData
from zoo.errors import OptionError
from zoo.features import forget
from zoo.model import Model
from zoo.training.cutting import Cut, find_cut
from zoo.training.losses import criterion
from zoo.training.settings import Settings
from zoo.training.streams import Stream
from zoo.transfers.finetune import finetune

CLASSES = ("a", "b", "c")
LOSS = criterion("cross_entropy")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    torch.manual_seed(0)
    forget()
    yield
    forget()


def net(name: str = "timm/test_resnet", seed: int = 0, **options: Any) -> Model:
    side = 8 if name == "mnist_cnn" else 32
    return zoo.backbone(name, classes=CLASSES, image_size=side, device="cpu", seed=seed, **options)


def images(n: int = 32, side: int = 32) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    pixels = torch.rand(n, 3, side, side, generator=generator) * 0.7
    pixels[torch.arange(n), labels] += 0.3
    return ImageData(pixels, labels, CLASSES)


def cut_of(model: Model, freeze: Any) -> Cut | None:
    objective = finetune(model, criterion=LOSS, freeze=freeze, norms="frozen")
    objective.choose_trained()
    return find_cut(objective, images(4, model.image_size))


def gap(a: Model, b: Model) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(
        a.state_dict().values(), b.state_dict().values(), strict=True))


def run_by(model: Model) -> list[int]:
    """How many images a layer in the first block is given."""
    counts: list[int] = []
    inner: Any = next(model.each_member()).net
    inner.layer1[0].conv1.register_forward_pre_hook(lambda _, given: counts.append(len(given[0])))
    return counts


PLACES: list[tuple[str, Any, str | None]] = [
    ("timm/test_resnet", 1, "layer1"), ("timm/test_resnet", 4, "global_pool"),
    ("timm/test_resnet", "conv1", "conv1"),
    ("timm/test_resnet", ["conv1", "bn1", "layer1.*"], "layer1"),
    # The shortcut leads around what is frozen of this block: what comes before the block is all.
    ("timm/test_resnet", ["conv1", "bn1", "layer1", "layer2.0.conv1", "layer2.0.bn1"], "layer1"),
    ("timm/test_resnet", ["layer2", "layer3"], None),
    ("timm/test_vit", 3, "blocks.2"), ("timm/test_vit", ["blocks.*"], None),
    ("timm/test_vit", ["blocks.*", "patch_embed", "cls_token"], None),
    ("timm/test_vit", ["blocks.*", "patch_embed", "cls_token", "pos_embed"], "blocks"),
    ("timm/test_convnext", 2, "stages.1.downsample"), ("timm/test_efficientnet", 3, "blocks.2"),
    ("timm/test_efficientnet", ["conv_stem", "bn1", "blocks", "conv_head", "bn2"], "global_pool"),
    ("mnist_cnn", ["conv1"], "act1"),
]


@pytest.mark.parametrize(("name", "freeze", "place"), PLACES, ids=str)
def test_the_cut_is_the_deepest_that_is_right(name: str, freeze: Any, place: str | None) -> None:
    cut = cut_of(net(name), freeze)
    found = None if cut is None else cut.entries[0].name
    assert found == place


@pytest.mark.parametrize(("name", "freeze", "strategy"), [
    *((name, freeze, None) for name, freeze, place in PLACES if place),
    *((name, 2, strategy) for name in ("timm/test_resnet", "timm/test_vit")
      for strategy in ("concat", "mean", "attention"))], ids=str)
def test_training_from_the_cut_is_training_of_the_whole(
    name: str, freeze: Any, strategy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> tuple[Model, list[Any]]:
        model = net(name)
        if strategy:
            model = zoo.fuse([model, net(name, seed=1)], strategy,
                             **({"hidden": 8} if strategy == "attention" else {}))
        data = images(side=model.image_size)
        result = zoo.transfer(model, data, "finetune", epochs=2, lr=1e-3, batch_size=16,
                              val=data, freeze=freeze, optimizer="sgd")
        return model, result.history

    model, history = trained()
    monkeypatch.setattr("zoo.training.transferring.find_cut", lambda *_: None)
    whole, expected = trained()
    assert gap(model, whole) < 1e-5
    for one, other in zip(history, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["val_nll"] == pytest.approx(other["val_nll"], rel=1e-4)


def test_frozen_layers_are_run_once_and_stay() -> None:
    model = net()
    counts = run_by(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = zoo.transfer(model, images(), "finetune", epochs=5, freeze=1, norms="train", val=0.25)
    assert 32 <= sum(counts) < 32 + 24, "each image once, and a few looks to find the place"
    assert any("run once, up to layer1 of timm/test_resnet" in note for note in result.notes)
    for name, tensor in model.state_dict().items():
        part = name.removeprefix("members.0.net.")
        frozen = part.startswith(("conv1", "bn1", "layer1"))
        assert torch.equal(tensor, before[name]) is frozen, name
    x = images().batch(range(4))[0]
    assert model(x).requires_grad, "flags come back"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_what_is_kept_up_to_the_cut_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, passes = net(), images(), []
    extract = features.extract
    monkeypatch.setattr(features, "extract",
                        lambda *a, **o: passes.append(1) or extract(*a, **o))
    for freeze, expected in ((1, 1), (1, 1), (2, 2)):
        zoo.transfer(model, data, "finetune", epochs=1, freeze=freeze)
        assert len(passes) == expected  # the layers after the cut have changed, and do not count
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    zoo.transfer(model, data, "finetune", epochs=1, freeze=1)
    assert len(passes) == 3


def test_a_failure_leaves_the_network_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before = model(images(4).batch(range(4))[0])

    def fail(*_: Any) -> Tensor:
        raise KeyError("mine")

    monkeypatch.setattr("zoo.transfers.objective.Objective.loss", fail)
    with pytest.raises(KeyError):
        zoo.transfer(model, images(), "finetune", epochs=1, freeze=2)
    assert torch.equal(model(images(4).batch(range(4))[0]), before)


class _Scaled(nn.Module):
    """Gives twice what its part gives, times a number that trains."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.part(x) * self.scale
        return answer


def test_what_is_no_chain_or_not_all_frozen_is_noticed() -> None:
    model = net()
    inner: Any = next(model.each_member()).net
    inner.layer1 = _Scaled(inner.layer1)
    cut = cut_of(model, ["conv1", "bn1", "layer1.part"])
    assert cut is not None
    assert cut.entries[0].name == "layer1.part"
    jump = inner.forward_features
    inner.forward_features = lambda x: jump(x) + x.mean()  # past all layers
    assert cut_of(model, ["conv1", "bn1", "layer1.part"]) is None


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm2d(32, affine=False)], ids=str)
def test_what_is_random_is_not_before_the_cut(layer: nn.Module) -> None:
    model = net()
    inner: Any = next(model.each_member()).net
    inner.act1 = nn.Sequential(inner.act1, layer)
    objective = finetune(model, criterion=LOSS, freeze=2, norms="train")
    objective.choose_trained()
    cut = find_cut(objective, images(4))
    assert cut is not None
    assert cut.entries[0].name == "act1.0"
    if isinstance(layer, nn.Dropout):
        layer.p = 0.0
        cut = find_cut(objective, images(4))
        assert cut is not None
        assert cut.entries[0].name == "layer2"


def test_one_of_two_networks_may_be_cut() -> None:
    model = zoo.fuse([net(), net("timm/test_vit")], "concat")
    cut = cut_of(model, ["conv1", "bn1", "layer1"])
    assert cut is not None
    assert not cut.whole
    result = zoo.transfer(model, images(), "finetune", epochs=1, freeze=["conv1", "bn1", "layer1"])
    assert any("up to layer1" in note for note in result.notes)


def test_without_room_they_are_run_in_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    small = net()
    zoo.transfer(small, images(), "finetune", epochs=2, freeze=1)
    monkeypatch.setattr(features, "KEEP_BYTES", 1000)
    model = net()
    result = zoo.transfer(model, images(), "finetune", epochs=2, freeze=1)
    assert any("there is no room for what they give (layer1 of" in note for note in result.notes)
    assert gap(small, model) < 1e-5


def test_with_teachers() -> None:
    a, teacher = net(), net(seed=1)
    result = zoo.transfer(a, images(), "finetune", epochs=1, freeze=1, teachers=[teacher])
    assert any("run once" in note for note in result.notes)


def test_one_member_is_frozen_and_its_like_trains() -> None:
    inner = zoo.fuse([net("timm/test_vit"), net("timm/test_vit")], "gated", hidden=4)
    model = zoo.fuse([net(), net(), inner], "concat")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    result = zoo.transfer(model, images(), "finetune", epochs=1,
                          freeze=["members.0", "members.1.layer1", "members.2.members.1",
                                  "members.2.fuser"])
    changed = {name for name, tensor in model.named_parameters()
               if not torch.equal(tensor, before[name])}
    for same, trained in (("members.0.", "members.1.net.layer2."),
                          ("members.1.net.layer1.", "members.1.net.conv1."),
                          ("members.2.net.members.1.", "members.2.net.members.0."),
                          ("members.2.net.fuser.", "head.")):
        assert not any(name.startswith(same) for name in changed), same
        assert any(name.startswith(trained) for name in changed), trained
    assert "run once, up to global_pool of timm/test_resnet" in str(result.notes)


@pytest.mark.parametrize(("freeze", "problem"), [
    ("members.3", "is called 'members.3' or lies in .* did you mean 'members.0'"),
    ("members.0.layr1", "did you mean 'members.0.layer1'"),
    (0, "'freeze' is 0, expected 1 to 4, the blocks of timm/test_resnet"),
    (5, "'freeze' is 5, expected 1 to 4"),
    ("layr1", "no parameter of the networks is called 'layr1' or lies in a part of that name; "
              "did you mean 'layer1'"),
    (["layer1", "stem*"], "is called 'stem\\*' .*"),
    (1.5, "'freeze' is 1.5"),
])
def test_a_wrong_freeze(freeze: Any, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        zoo.transfer(net(), images(), "finetune", epochs=1, freeze=freeze)


def test_blocks_without_numbers() -> None:
    with pytest.raises(OptionError, match="tell of no blocks; name the parts to freeze: conv1, "):
        zoo.transfer(net("mnist_cnn"), images(side=8), "finetune", epochs=1, freeze=1)


# Augmented images, so many of each


@pytest.mark.parametrize(("method", "options"), [
    ("linear_probe", {}), ("finetune", {"freeze": 1})])
def test_each_view_is_run_once(method: str, options: Any) -> None:
    model = net()
    counts = run_by(model)
    zoo.transfer(model, images(24), method, epochs=7, augment="basic", views=2, val=images(8),
                 **options)
    looks = sum(counts) - 2 * 24 - 8
    assert 0 <= looks < 16, "two views of each, validation once, and a few looks"


@pytest.mark.parametrize(("method", "options"), [
    ("linear_probe", {}), ("finetune", {"freeze": 1, "optimizer": "sgd"})])
def test_as_many_views_as_epochs_are_the_augmentation_as_it_was(method: str, options: Any) -> None:
    fresh, kept, fewer = net(), net(), net()
    for model, views in ((fresh, None), (kept, 3), (fewer, 1)):
        zoo.transfer(model, images(), method, epochs=3, augment="basic", views=views, **options)
    assert gap(fresh, kept) < 1e-5
    assert gap(fresh, fewer) > 1e-4


def test_views_differ_and_come_back() -> None:
    model, data = net(), images()
    settings = Settings(augment="basic", views=2)
    stream = Stream(model, data, settings, frozen=True)
    sums = []
    for epoch in range(4):
        rows = [batch.features for batch in stream.epoch(epoch, 0)]
        sums.append(sum(float(row[0].sum()) for row in rows if row))
    assert sums[0] == pytest.approx(sums[2])
    assert sums[1] == pytest.approx(sums[3])
    assert sums[0] != pytest.approx(sums[1])


@pytest.mark.parametrize("change", [{"seed": 1}, {"augment": {"scale": [0.2, 0.3]}}])
def test_views_are_known_by_how_they_are_made(change: dict[str, Any]) -> None:
    results = []
    for settings in ({}, change):
        forget()
        for each in ({}, settings):  # after others have been kept
            model = net()
            zoo.transfer(model, images(), "linear_probe", epochs=2, views=2,
                         **{"augment": "basic", **each})
        results.append(model)
    fresh = net()
    forget()
    zoo.transfer(fresh, images(), "linear_probe", epochs=2, views=2,
                 **{"augment": "basic", **change})
    assert gap(results[1], fresh) == 0
    assert gap(results[0], fresh) > 0


def test_teachers_of_views() -> None:
    a, b, teacher = net(), net(), net(seed=1)
    for model, views in ((a, None), (b, 2)):
        zoo.transfer(model, images(), "finetune", epochs=2, augment="basic", views=views, freeze=1,
                     teachers=[teacher], optimizer="sgd")
    assert gap(a, b) < 1e-5


@pytest.mark.parametrize(("method", "settings", "problem"), [
    ("linear_probe", {"views": 2}, "views are of augmented images; pass augment="),
    ("linear_probe", {"views": 0, "augment": "basic"}, "views is 0, expected a whole number, 1 or"),
    ("finetune", {"views": 2, "augment": "basic"}, "views are for frozen networks, and this trains "
                                                   "them; leave views out, freeze a part of them"),
])
def test_views_that_make_no_sense(method: str, settings: Any, problem: str) -> None:
    with pytest.raises(OptionError, match=problem):
        zoo.transfer(net(), images(), method, epochs=1, **settings)


def test_frozen_layers_of_images_that_are_always_new() -> None:
    result = zoo.transfer(net(), images(), "finetune", epochs=1, freeze=1, augment="basic")
    assert any("augmented anew; with views=" in note for note in result.notes)
