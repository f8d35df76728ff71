"""What members give to a fusion of features: chosen layers, pooled in a chosen way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

import zoo
from zoo import features
from zoo.backbones import Preprocessing
from zoo.blueprints import Blueprint
from zoo.building import member_of
from zoo.cli import main
from zoo.datasets import ImageData
from zoo.errors import FormatError, FusionError, OptionError, RecipeError
from zoo.fusion.specs import SPECS
from zoo.model import Model
from zoo.store import network

STRATEGIES = [spec.name for spec in SPECS if spec.kind == "features"]
LETTERS = ("a", "b", "c", "d")


def build(name: str, side: int = 64, **options: Any) -> Model:
    return zoo.backbone(name, classes=LETTERS, image_size=side, device="cpu", seed=0, **options)


@pytest.fixture(scope="module")
def resnet() -> Model:
    return build("test_resnet")


@pytest.fixture(scope="module")
def vit() -> Model:
    return build("test_vit")


@pytest.fixture(scope="module")
def unlike() -> list[Model]:
    return [build("resnet10t"), narrow_vgg(), build("inception_v3", 75), build("test_vit")]


def narrow_vgg() -> Model:
    """With a hundredth of the neurons between its convolutions and its classifier."""
    net: Any = timm.create_model("vgg11", num_classes=4, mlp_ratio=0.01)
    net.preprocessing = Preprocessing(size=(32, 32))
    blueprint = Blueprint(backbone="timm/vgg11", num_classes=4, image_size=32)
    return Model([member_of(net, "timm/vgg11", LETTERS, blueprint, {})], classes=LETTERS)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def inside(model: Model, *names: str) -> list[Tensor]:
    """The outputs of these modules, in a whole run of the network."""
    net, found = network(model), {}
    hooks = [net.get_submodule(name).register_forward_hook(
        lambda _, __, output, name=name: found.update({name: output})) for name in names]
    model(images())
    for hook in hooks:
        hook.remove()
    return [found[name] for name in names]


@torch.no_grad()
def given(model: Model) -> list[Tensor]:
    return list(model.trunk(images()))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_fuses_unlike_networks(strategy: str, unlike: list[Model]) -> None:
    model = zoo.fuse(unlike, strategy, classes=LETTERS[::-1])
    names = [member.name.partition(".")[0] for member in model.each_member()]
    assert names == ["timm/resnet10t", "timm/vgg11", "timm/inception_v3", "timm/test_vit"]
    assert model.classes == LETTERS[::-1]
    model.train()
    model(images()).square().sum().backward()
    for name, parameter in (*model.fuser.named_parameters(), *model.head.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for member in model.each_member():
        first = next(member.parameters())
        assert first.grad is not None, member.name
        assert first.grad.abs().sum() > 0, member.name
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(images()).isfinite().all()


@pytest.mark.parametrize(("strategy", "layer"), [
    ("film", None), ("attention", None), ("iaff", [["layer2", "layer3"], "Mixed_5b", None])])
def test_unlike_networks_are_saved_with_their_layers(
    strategy: str, layer: Any, unlike: list[Model], tmp_path: Path
) -> None:
    resnet, _, inception, vit = unlike
    model = zoo.fuse([resnet, inception, vit], strategy, layer=layer)
    again = zoo.load(zoo.save(model, tmp_path / "m"), device="cpu")
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))
    assert again.describe() == model.describe()


def test_the_order_of_members_is_the_one_that_is_given(resnet: Model, vit: Model) -> None:
    one, other = (zoo.fuse(pair, "film", classes=LETTERS) for pair in (
        [resnet, vit], [vit, resnet]))
    assert one.fuser.enter.in_features == 96  # the first is modulated
    assert other.fuser.enter.in_features == 64


def test_a_layer_is_what_the_network_computes_there(resnet: Model, vit: Model) -> None:
    grid, sequence = inside(resnet, "layer2")[0], inside(vit, "blocks.1")[0]
    choice = ["layer2", "blocks.1"]
    vectors = given(zoo.fuse([resnet, vit], "concat", layer=choice))
    torch.testing.assert_close(vectors, [grid.mean((2, 3)), sequence[:, 0]])  # its class token
    tokens = given(zoo.fuse([resnet, vit], "attention", layer=choice))
    torch.testing.assert_close(tokens, [grid.flatten(2).mT, sequence])
    maps = given(zoo.fuse([resnet, vit], "aff", layer=choice))
    torch.testing.assert_close(maps, [grid, sequence[:, 1:].mT.unflatten(2, (4, 4))])


def test_several_depths_meet_on_the_finest_grid(resnet: Model, vit: Model) -> None:
    fine, coarse = inside(resnet, "layer2", "layer4")
    assert fine.shape[2] > coarse.shape[2]
    enlarged = functional.interpolate(coarse, fine.shape[2:], mode="bilinear")
    depths = [["layer4", "layer2"], ["blocks.0", "blocks.1"]]
    model = zoo.fuse([resnet, vit], "aff", layer=depths)
    first, second = given(model)
    torch.testing.assert_close(first, torch.cat([enlarged, fine], 1))
    assert [member.dim for member in model.each_member()] == [first.shape[1], second.shape[1]]
    vectors = given(zoo.fuse([resnet, vit], "concat", layer=depths, pool="avg"))
    blocks = inside(vit, "blocks.0", "blocks.1")
    torch.testing.assert_close(vectors, [
        torch.cat([coarse.mean((2, 3)), fine.mean((2, 3))], 1),
        torch.cat([block[:, 1:].mean(1) for block in blocks], 1)])


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "gem"])
def test_pools(pool: str, resnet: Model, vit: Model) -> None:
    def expected(z: Tensor) -> Tensor:
        """Of [B, N, D], written out."""
        return {"avg": z.mean(1), "max": z.max(1).values,
                "avgmax": (z.mean(1) + z.max(1).values) / 2,
                "gem": z.clamp(1e-6).pow(3).mean(1).pow(1 / 3)}[pool]

    grid, sequence = inside(resnet, "layer4")[0], inside(vit, "norm")[0]
    found = given(zoo.fuse([resnet, vit], "concat", pool=pool))
    wanted = [expected(grid.flatten(2).mT), expected(sequence[:, 1:])]
    torch.testing.assert_close(found, wanted)
    one_position = given(zoo.fuse([resnet, vit], "aff", pool=pool))
    torch.testing.assert_close(one_position, [one[:, :, None, None] for one in wanted])


def test_the_class_token_by_either_name(resnet: Model, vit: Model) -> None:
    sequence = inside(vit, "norm")[0]
    for pool in ("cls", "token"):
        model = zoo.fuse([resnet, vit], "concat", pool=[None, pool])
        torch.testing.assert_close(given(model)[1], sequence[:, 0])
    with pytest.raises(FusionError, match=r"test_resnet.* it has no class token for pool='cls'; "):
        zoo.fuse([resnet, vit], "concat", pool="cls")


def test_nothing_behind_the_last_layer_runs(resnet: Model, vit: Model) -> None:
    model = zoo.fuse([resnet, vit], "concat", layer=[["layer2", "layer1"], None])
    net: Any = next(model.each_member()).net
    ran: list[str] = []
    for name in ("layer2", "layer3"):
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    model(images())
    assert ran == ["layer2"]
    model.train()(images()).sum().backward()
    assert net.conv1[0].weight.grad.abs().sum() > 0


def test_what_is_kept_is_kept_by_layer_and_pool(resnet: Model, vit: Model) -> None:
    features.forget()
    data = ImageData(images(4), [0, 1, 2, 3], LETTERS)
    shapes = {features.trunk_features(zoo.fuse([resnet, vit], "concat", layer=layer), data)[0].shape
              for layer in (None, ["layer1", None], ["layer2", None])}
    assert len(shapes) == 3
    mean, most = (features.trunk_features(
        zoo.fuse([resnet, vit], "concat", pool=pool), data)[0] for pool in ("avg", "max"))
    assert (most >= mean).all()
    assert not torch.equal(most, mean)


@pytest.mark.parametrize(("choice", "problem"), [
    ({"layer": "layr3"}, r"test_resnet.* has no layer 'layr3'; did you mean 'layer3' or .*\? it "
                         r"has .*layer1, layer2, layer3, layer4, and what is inside them"),
    ({"layer": ["layer3"]}, r"layer has 1 entries for 2 members; give one for each"),
    ({"layer": 3}, r"layer is 3, expected a name, or a list with one for each member"),
    ({"layer": [[], None]}, r"layer has \[\] for a member, expected a layer's name, a list"),
    ({"pool": "mean"}, r"pool is 'mean', expected 'avg', 'max', 'avgmax', 'gem', 'cls' or null"),
    ({"pool": ["avg", "max", None]}, r"pool has 3 entries for 2 members"),
])
def test_wrong_choices_say_what_is_right(
    choice: dict[str, Any], problem: str, resnet: Model, vit: Model
) -> None:
    with pytest.raises(OptionError, match=problem):
        zoo.fuse([resnet, vit], "concat", **choice)


def test_where_there_is_no_choice(resnet: Model, vit: Model) -> None:
    with pytest.raises(OptionError, match="layer belongs to fusions of features; leave it out"):
        zoo.fuse([resnet, vit], "mean", layer="layer3")
    with pytest.raises(OptionError, match="pool belongs to fusions of features; leave it out"):
        zoo.fuse([resnet, resnet], "average", pool="avg")
    with pytest.raises(FusionError, match=r"of timm/test_resnet.* its layer 'fc' is not run on"):
        zoo.fuse([resnet, vit], "concat", layer=["fc", None])
    inner = zoo.fuse([resnet, vit], "concat", layer=["layer2", None])
    with pytest.raises(OptionError, match="concat is a fused model and gives one vector"):
        zoo.fuse([inner, vit], "concat", pool="avg")
    assert zoo.fuse([inner, vit], "concat", pool=[None, "avg"])(images()).shape == (2, 4)


def test_older_loaders_are_told_and_older_folders_load(
    resnet: Model, vit: Model, tmp_path: Path
) -> None:
    model = zoo.fuse([resnet, vit], "concat", layer=["layer2", None], pool="max")
    assert model.recipe["layer"] == ["layer2", None]
    file = zoo.save(model, tmp_path / "m") / "config.json"
    config = json.loads(file.read_text())
    assert config["zoo"]["must_understand"] == ["gives", "layers"]
    for wrong, problem in (({"pool": "median"}, "pools by 'median', expected avg or max"),
                           ({"layers": ["layer22"]}, "has no layer 'layer22'; did you mean")):
        changed = json.loads(json.dumps(config))
        changed["zoo"]["model"]["members"][0] |= wrong
        file.write_text(json.dumps(changed))
        with pytest.raises(FormatError, match=problem):
            zoo.load(tmp_path / "m")
    plain = zoo.fuse([resnet, vit], "concat")
    file = zoo.save(plain, tmp_path / "plain") / "config.json"
    config = json.loads(file.read_text())
    assert config["zoo"]["must_understand"] == []
    for member in config["zoo"]["model"]["members"]:
        del member["layers"], member["pool"]  # as it was written before there was a choice
    file.write_text(json.dumps(config))
    with torch.no_grad():
        assert torch.equal(zoo.load(tmp_path / "plain", device="cpu")(images()), plain(images()))


def test_on_the_command_line(resnet: Model, vit: Model, tmp_path: Path) -> None:
    paths = [str(zoo.save(model, tmp_path / name))
             for name, model in (("r", resnet), ("v", vit))]
    with pytest.raises(SystemExit) as done:
        main(["fuse", *paths, "--with", "concat", "--layer", "[[layer2, layer3], null]",
              "--pool", "max", "-o", str(tmp_path / "f")])
    assert not done.value.code
    model = zoo.load(tmp_path / "f", device="cpu")
    assert [(member.layers, member.pool) for member in model.each_member()] == [
        (("layer2", "layer3"), "max"), ((), "max")]


RECIPE = """\
data: {target: {train: {data: digits, limit: 30}, test: {data: digits, limit: 20}}}
source: {backbone: test_resnet, image_size: 32, pretrained: false, transfer: {epochs: 1}}
target: {backbone: test_vit, image_size: 32, transfer: {epochs: 1}}
everything: {transfer: {epochs: 1}}
fuse: {strategy: concat, layer: [layer3, blocks.0], pool: max, transfer: {epochs: 1}}
"""


def test_in_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("layer3", "layr3"))
    with pytest.raises(RecipeError, match=r"recipe.yaml:5: fuse\.layer: .*did you mean 'layer3'"):
        zoo.run(file, tmp_path / "wrong")
    file.write_text(RECIPE)
    members = list(zoo.run(file, tmp_path / "run").model.each_member())
    assert [(member.layers, member.pool) for member in members] == [
        (("layer3",), "max"), (("blocks.0",), "max")]
