"""Tokens and maps of every family, and strategies that take them from fuse to load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

import zoo
from zoo import features
from zoo.backbones.semantics import maps, on_one_grid, pooled_features, tokens
from zoo.datasets import ImageData
from zoo.errors import FormatError, FusionError, ZooError
from zoo.model import Model
from zoo.testing import run_checks
from zoo.training.settings import Settings
from zoo.training.streams import Stream

LETTERS = ("a", "b", "c", "d")
WIDE = (64, 96)  # so that rows and columns cannot be confused
SWIN = {"img_size": WIDE, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
# name, arguments, image, tokens [N, D], maps [D, h, w]
FAMILIES: list[tuple[str, dict[str, Any], tuple[int, int], list[int], list[int]]] = [
    ("test_resnet", {}, WIDE, [6, 96], [96, 2, 3]),
    ("vgg11", {}, WIDE, [6, 512], [512, 2, 3]),
    ("test_convnext", {}, WIDE, [6, 64], [64, 2, 3]),
    ("test_efficientnet", {}, WIDE, [6, 256], [256, 2, 3]),
    ("mobilenetv3_small_050", {}, WIDE, [6, 288], [288, 2, 3]),  # pooled: 1024
    ("inception_v3", {}, (96, 128), [2, 2048], [2048, 1, 2]),
    ("test_vit", {"img_size": WIDE}, WIDE, [25, 64], [64, 4, 6]),
    ("test_vit", {"img_size": WIDE, "patch_size": (8, 16)}, WIDE, [49, 64], [64, 8, 6]),
    ("test_vit", {"dynamic_img_size": True}, WIDE, [25, 64], [64, 4, 6]),
    ("test_vit", {"dynamic_img_size": True}, (48, 192), [37, 64], [64, 3, 12]),
    ("test_vit", {"img_size": WIDE, "class_token": False, "global_pool": "avg"}, WIDE, [24, 64],
     [64, 4, 6]),
    ("test_vit", {"img_size": WIDE, "reg_tokens": 4}, WIDE, [29, 64], [64, 4, 6]),
    ("swin_tiny_patch4_window7_224", SWIN, WIDE, [96, 16], [16, 8, 12]),  # channels last
    ("test_mambaout", {}, WIDE, [6, 64], [64, 2, 3]),  # channels last; pooled: 256
    ("mixer_s32_224", {"img_size": WIDE}, WIDE, [6, 512], [512, 2, 3]),  # names no grid
    ("coat_lite_tiny", {"img_size": 64}, (64, 64), [5, 320], [320, 2, 2]),  # names no prefix
]


@pytest.mark.parametrize(("name", "arguments", "image", "sequence", "grid"), FAMILIES)
def test_tokens_and_maps_of_every_family(
    name: str, arguments: dict[str, Any], image: tuple[int, int], sequence: list[int],
    grid: list[int],
) -> None:
    net = timm.create_model(name, num_classes=4, **arguments).eval()
    x = torch.rand(2, 3, *image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given, mapped = tokens(net, x), maps(net, x)
    assert list(given.shape) == [2, *sequence]
    assert list(mapped.shape) == [2, *grid]
    patches = given[:, -grid[1] * grid[2]:]  # row by row, whatever comes before them
    assert torch.equal(mapped.flatten(2).transpose(1, 2), patches)


@pytest.mark.parametrize(("name", "arguments"), [
    ("test_resnet", {}), ("test_efficientnet", {}), ("swin_tiny_patch4_window7_224", SWIN),
    ("mixer_s32_224", {"img_size": WIDE}),
])
def test_the_mean_of_the_maps_is_what_the_network_pools(
    name: str, arguments: dict[str, Any]
) -> None:
    net = timm.create_model(name, num_classes=4, **arguments).eval()
    x = torch.rand(2, 3, *WIDE)
    with torch.no_grad():
        torch.testing.assert_close(maps(net, x).mean((2, 3)), pooled_features(net, x))


def test_a_patch_stands_in_the_maps_where_it_stands_in_the_image() -> None:
    net = timm.create_model("test_vit", img_size=WIDE, reg_tokens=2, depth=0).eval()
    x = torch.rand(1, 3, *WIDE)
    other = x.clone()
    other[..., 16:32, 80:96] = 0
    with torch.no_grad():
        changed = (maps(net, x) != maps(net, other)).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 5]]


class Said(nn.Module):
    """A network that gives these features before pooling, and says this of itself."""

    def __init__(self, features: Any, **said: Any) -> None:
        super().__init__()
        self.features = features
        for name, value in said.items():
            setattr(self, name, value)

    def forward_features(self, x: Tensor) -> Any:
        return self.features

    def forward_head(self, z: Any, pre_logits: bool = False) -> Tensor:
        return torch.ones(2, 7)


def test_the_layout_is_the_one_that_the_network_names_or_that_its_width_fits() -> None:
    x = torch.zeros(2, 3, 8, 8)
    cases: list[tuple[tuple[int, ...], dict[str, Any], list[int]]] = [
        ((5, 4, 4), {"num_features": 5}, [5, 4, 4]),
        ((4, 4, 5), {"num_features": 5}, [5, 4, 4]),
        ((4, 4, 5), {}, [4, 4, 5]),
        ((4, 4, 4), {"num_features": 4}, [4, 4, 4]),
        ((5, 6, 4), {"num_features": 5, "output_fmt": "NHWC"}, [4, 5, 6]),
        ((4, 6, 5), {"num_features": 5, "output_fmt": "NCHW"}, [4, 6, 5]),
    ]
    for shape, said, expected in cases:
        assert list(maps(Said(torch.zeros(2, *shape), **said), x).shape) == [2, *expected]


@pytest.mark.parametrize(("given", "said", "reason"), [
    (torch.zeros(2, 7), {}, r"its features before pooling are \[B, 7\]"),
    ([torch.zeros(2, 4, 7), torch.zeros(2, 9, 7)], {}, "before pooling are several tensors"),
    (torch.zeros(2, 8, 7), {}, r"its tokens \[B, 8, 7\] are no grid of an image of 8 × 8 pixels"),
    (torch.zeros(2, 16, 7), {"num_prefix_tokens": 1}, r"its tokens \[B, 16, 7\] are no grid"),
    (torch.zeros(2, 1, 7), {"num_prefix_tokens": 1}, r"its tokens \[B, 1, 7\] are no grid"),
    (torch.zeros(2, 1, 7), {"num_prefix_tokens": 2}, r"its tokens \[B, 1, 7\] are no grid"),
])
def test_what_is_no_grid_has_no_maps_and_says_why(
    given: Any, said: dict[str, Any], reason: str
) -> None:
    net, x = Said(given, **said), torch.zeros(2, 3, 8, 8)
    with pytest.raises(ZooError, match=reason):
        maps(net, x)
    expected = given if isinstance(given, Tensor) and given.ndim == 3 else torch.ones(2, 1, 7)
    assert torch.equal(tokens(net, x), expected)


def test_maps_meet_on_the_finest_grid() -> None:
    wide, tall = torch.rand(2, 3, 2, 4), torch.rand(2, 5, 3, 2)
    one, other = on_one_grid([wide, tall])
    assert one.shape == (2, 3, 3, 4)
    assert other.shape == (2, 5, 3, 4)
    torch.testing.assert_close(
        one, functional.interpolate(wide, (3, 4), mode="bilinear", align_corners=False))
    assert on_one_grid([wide, wide])[0] is wide


def build(name: str, **arguments: Any) -> Model:
    side = {"test_vit": 64, "test_resnet": 96, "mnist_cnn": 12}.get(name, 32)
    return zoo.backbone(name, **{"classes": LETTERS, "seed": 0, "device": "cpu",
                                 "image_size": side, **arguments})


def labelled(count: int = 64) -> ImageData:
    """Bright where the label says: in one of the four quarters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    pixels = torch.rand(count, 3, 12, 12, generator=generator) / 2
    for pixel, label in zip(pixels, labels.tolist(), strict=True):
        pixel[:, 6 * (label // 2):][:, :6, 6 * (label % 2):][:, :, :6] += 0.5
    return ImageData(pixels, labels, LETTERS)


MEMBERS = ("test_vit", "test_resnet", "mnist_cnn", "test_efficientnet")
DIMS = [64, 96, 32, 256]
SHAPES = {"attention": [(17, 64), (9, 96), (9, 32), (1, 256)],
          "aff": [(64, 4, 4), (96, 3, 3), (32, 3, 3), (256, 1, 1)]}
each = pytest.mark.parametrize("strategy", ["attention", "aff"])


@pytest.fixture(scope="module")
def members() -> list[Model]:
    return [build(name) for name in MEMBERS]


def fused(members: list[Model], strategy: str, **options: Any) -> Model:
    return zoo.fuse(members, strategy, **{"hidden": 16, **options})


@each
def test_from_fuse_to_load(members: list[Model], strategy: str, tmp_path: Path) -> None:
    model, data = fused(members, strategy), labelled()
    x = data.batch(range(3))[0]
    with torch.no_grad():
        assert [tuple(part.shape[1:]) for part in model.trunk(x)] == SHAPES[strategy]
    assert [member.dim for member in model.each_member()] == DIMS
    trunk = {name: p.clone() for name, p in model.members.named_parameters()}
    probed = zoo.transfer(model, data, "linear_probe", epochs=6, lr=0.01, batch_size=16)
    assert probed.history[-1]["loss"] < probed.history[0]["loss"] - 0.2
    assert all(torch.equal(p, trunk[name]) for name, p in model.members.named_parameters())
    zoo.transfer(model, data, "finetune", epochs=2, batch_size=16)
    assert not torch.equal(model.get_parameter("members.0.net.cls_token"),
                           trunk["0.net.cls_token"])
    assert zoo.evaluate(model, data).accuracy > 0.5
    again = zoo.load(zoo.save(model, tmp_path / "m"), device="cpu")
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert model.embed(x).shape == (3, model.dim) == (3, 16)
        assert torch.equal(model.classify(model.embed(x)), model(x))
    assert again.describe() == model.describe()
    zoo.transfer(again, data, "linear_probe", epochs=1)


@each
def test_one_image_autocast_bfloat16_and_one_graph(members: list[Model], strategy: str) -> None:
    model = fused(members, strategy)
    zoo.transfer(model, labelled(16), "linear_probe", epochs=1, batch_size=8)
    x = labelled().batch(range(4))[0]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(model(x[:1]), expected[:1], atol=1e-4, rtol=1e-4)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, atol=0.2, rtol=0.1)
        half = zoo.fuse([build(name, dtype="bf16") for name in MEMBERS], strategy, dtype="bf16")
        assert half(x).dtype == torch.bfloat16


@each
def test_what_there_is_no_room_for_is_computed_in_every_epoch(
    members: list[Model], strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, seen, results = labelled(32), [], []
    needed = 32 * 4 * sum(torch.Size(shape).numel() for shape in SHAPES[strategy][:3])
    # A look at one image says what is needed; then all of them once, or twice (val) in 3 epochs.
    for room, expected in ((needed, 1 + 32 + 1), (needed - 1, 1 + 3 * (32 + 32))):
        features.forget()
        seen.clear()
        monkeypatch.setattr(features, "KEEP_BYTES", room)
        model = fused(members[:3], strategy)
        net: Any = next(model.each_member()).net
        net.patch_embed.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
        done = zoo.transfer(model, data, "linear_probe", epochs=3, val=data, batch_size=16, lr=0.01)
        assert sum(seen) == expected
        results.append((model.state_dict(), [row["val_nll"] for row in done.history]))
    (state, history), (other, again) = results
    assert history == pytest.approx(again, rel=1e-3)
    for key in state:
        torch.testing.assert_close(state[key], other[key], atol=1e-4, rtol=1e-3)


@each
def test_of_a_teacher_only_its_answers_are_kept(members: list[Model], strategy: str) -> None:
    student, data = build("mnist_cnn"), labelled(8)
    stream = Stream(student, data, Settings(), teachers=[fused(members[:2], strategy)])
    assert stream.taught is not None
    assert [part.shape for part in stream.taught[0]] == [(8, 16), (8, 4)]


def test_what_is_kept_is_kept_by_kind(members: list[Model]) -> None:
    features.forget()
    data = labelled(8)
    for strategy, shapes in (("concat", [(64,), (96,)]), *(
            (strategy, SHAPES[strategy][:2]) for strategy in ("attention", "aff"))):
        kept = features.trunk_features(zoo.fuse(members[:2], strategy), data)
        assert [tuple(part.shape[1:]) for part in kept] == shapes


def test_a_fused_model_is_one_token_and_has_no_maps(
    members: list[Model], tmp_path: Path
) -> None:
    inner = fused(members[:2], "aff")
    outer = fused([inner, members[2]], "attention", hidden=8)
    x = labelled().batch(range(2))[0]
    with torch.no_grad():
        parts = outer.trunk(x)
        assert torch.equal(parts[0], inner.embed(x)[:, None])
        again = zoo.load(zoo.save(outer, tmp_path / "m"), device="cpu")
        assert torch.equal(again(x), outer(x))
    with pytest.raises(FusionError, match=(
            r"it takes maps, and zoo/attention has none: it is a fused model and gives one vector. "
            r"'attention' \(tokens\), 'concat' and 'gated' \(pooled features\) take every net")):
        fused([members[0], outer], "aff")
    with pytest.raises(FusionError, match=r"coat_tiny\.in1k has none: its features before"):
        fused([members[0], build("coat_tiny")], "aff")


def config_of(model: Model, folder: Path) -> tuple[Path, Any]:
    file = zoo.save(model, folder) / "config.json"
    return file, json.loads(file.read_text())


def test_an_older_loader_is_told_and_older_files_are_loaded(
    members: list[Model], tmp_path: Path
) -> None:
    file, config = config_of(fused(members[:2], "aff"), tmp_path / "maps")
    assert config["zoo"]["must_understand"] == ["gives"]
    nested = zoo.fuse([fused(members[:2], "aff"), members[2]], "concat")
    assert config_of(nested, tmp_path / "nested")[1]["zoo"]["must_understand"] == ["gives"]
    config["zoo"]["model"]["members"][0]["gives"] = "views"
    file.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="gives 'views', expected vectors or tokens or maps"):
        zoo.load(tmp_path / "maps")
    model = zoo.fuse(members[:2], "concat")
    file, config = config_of(model, tmp_path / "vectors")
    assert config["zoo"]["must_understand"] == []
    for member in config["zoo"]["model"]["members"]:
        del member["gives"]  # as it was written before there was a choice
    file.write_text(json.dumps(config))
    x = labelled().batch(range(2))[0]
    with torch.no_grad():
        assert torch.equal(zoo.load(tmp_path / "vectors", device="cpu")(x), model(x))


PLUGIN = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name=takes, build="zoo_acme:build", kind="features", takes=takes,
                           summary="the mean of each member's " + takes)
            for takes in ("tokens", "maps")]

def build(dims, *, scale: float = 1.0):
    """Means side by side.

    Options:
        scale: of the means
    """
    import torch

    class Mean(torch.nn.Module):
        out_features = sum(dims)

        def forward(self, features):
            assert [f.shape[1 if f.ndim == 4 else 2] for f in features] == list(dims)
            if features[0].ndim == 4:
                assert len({f.shape[2:] for f in features}) == 1
            means = [f.mean((2, 3) if f.ndim == 4 else 1) for f in features]
            return scale * torch.cat(means, 1)

    return Mean()
'''


@pytest.mark.parametrize(("mean", "faults"), [
    ("f.mean(", set()),
    ("f.mean() + f.mean(",
     {("acme/tokens", "images_do_not_mix"), ("acme/maps", "images_do_not_mix")}),
])
def test_a_plugin_is_checked_with_tokens_and_maps(
    mean: str, faults: set[tuple[str, str]], install: Callable[..., Path]
) -> None:
    assert "f.mean(" in PLUGIN
    install("acme", PLUGIN.replace("f.mean(", mean))
    failed = [outcome for outcome in run_checks("acme") if outcome.state == "failed"]
    assert {(outcome.check.subject, outcome.check.name) for outcome in failed} == faults
    assert all("answers differently for an image alone" in outcome.reason for outcome in failed)


@pytest.mark.parametrize("takes", ["tokens", "maps"])
def test_a_plugins_strategy_works(
    takes: str, members: list[Model], install: Callable[..., Path], tmp_path: Path
) -> None:
    install("acme", PLUGIN)
    model = zoo.fuse(members, f"acme/{takes}", scale=2.0)
    data = labelled(16)
    zoo.transfer(model, data, "linear_probe", epochs=1)
    zoo.transfer(model, data, "finetune", epochs=1)
    x = data.batch(range(2))[0]
    with torch.no_grad():
        given = model.trunk(x)
        mean = torch.cat([part.flatten(2).mean(2) if takes == "maps" else part.mean(1)
                          for part in given], 1)
        torch.testing.assert_close(model.embed(x)[:, :64], 2 * mean[:, :64])
        _, config = config_of(model, tmp_path / "m")
        assert config["zoo"]["requires"] == [
            {"namespace": "acme", "requirement": "fusion-zoo-acme>=1.0"}]
        assert torch.equal(zoo.load(tmp_path / "m", device="cpu")(x), model(x))


@each
def test_handwritten_digits_are_learnt(strategy: str) -> None:
    nets = [zoo.backbone("mnist_cnn", num_classes=10, image_size=side, device="cpu", seed=side)
            for side in (12, 16)]
    model = zoo.fuse(nets, strategy, num_classes=10, hidden=64)
    zoo.transfer(model, "zoo/digits", "finetune", epochs=3, lr=5e-3, batch_size=32)
    assert zoo.evaluate(model, "zoo/digits").accuracy > 0.6
