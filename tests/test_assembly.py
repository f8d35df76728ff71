"""Names in, models out; several models in, one out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.datasets import load_data
from zoo.errors import (
    FusionError,
    NotFitted,
    OptionError,
    ShapeMismatch,
    UnknownName,
    WeightsError,
)
from zoo.model import Model
from zoo.tensors.digest import digest

LETTERS = ("a", "b", "c", "d")
SIDES = {"test_resnet": 32, "test_vit": 32, "mnist_cnn": None, "test_convnext": 32}


def build(name: str = "test_vit", **arguments: Any) -> Model:
    given = {"num_classes": 4, "seed": 0, "device": "cpu", "image_size": SIDES.get(name)}
    return zoo.backbone(name, **{**given, **arguments})


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def labelled(count: int = 32) -> TensorDataset:
    """Images whose mean brightness is their label."""
    labels = torch.arange(count) % 4
    return TensorDataset(images(count) / 4 + labels.view(-1, 1, 1, 1) / 4, labels)


def state(model: Model) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def quietly(*arguments: Any, **keywords: Any) -> Model:
    """A fusion of weights without the warning about pooled statistics."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch norm's statistics were pooled")
        return zoo.fuse(*arguments, **keywords)


class TestBackbone:
    def test_one_seed_gives_one_network_and_leaves_torchs_generator_alone(self) -> None:
        before = torch.get_rng_state()
        one, other, third = build(seed=3), build(seed=3), build(seed=4)
        assert torch.equal(torch.get_rng_state(), before)
        with torch.no_grad():
            assert torch.equal(one(images()), other(images()))
            assert not torch.equal(one(images()), third(images()))

    def test_the_bare_name_is_timms_and_recorded_with_its_tag(self) -> None:
        assert build("test_resnet").name == "timm/test_resnet.r160_in1k"

    def test_class_names_and_evaluation_mode(self) -> None:
        model = build(classes=LETTERS, num_classes=4)
        assert model.classes == LETTERS
        assert build(num_classes=3).classes == ("0", "1", "2")
        assert not any(module.training for module in model.modules())

    def test_device_and_dtype(self) -> None:
        model = build(dtype="bf16", device=torch.device("cpu"))
        assert next(model.parameters()).dtype == torch.bfloat16
        assert model.device == torch.device("cpu")

    def test_activation(self) -> None:
        kinds = {type(module) for module in build(activation="relu").modules()}
        assert nn.ReLU in kinds
        assert nn.GELU not in kinds

    def test_a_saved_model_is_a_backbone_too(self, tmp_path: Path) -> None:
        model = build(classes=LETTERS)
        zoo.save(model, tmp_path / "m")
        again = zoo.backbone(tmp_path / "m", device="cpu")
        other = zoo.backbone(f"local-dir:{tmp_path / 'm'}", classes=["x", "y"], device="cpu")
        with torch.no_grad():
            assert torch.equal(again(images()), model(images()))
            assert other(images()).shape == (2, 2)
        assert other.classes == ("x", "y")
        with pytest.raises(OptionError, match="in_chans is fixed by the saved model; leave it out"):
            zoo.backbone(tmp_path / "m", in_chans=1)

    @pytest.mark.parametrize(("arguments", "error", "message"), [
        ({"num_classes": 3, "classes": LETTERS}, OptionError,
         "num_classes is 3 and there are 4 class names; give one of the two"),
        ({"num_classes": 0}, OptionError, "num_classes is 0, expected 1 or more"),
        ({"num_classes": None, "classes": ["a", "a"]}, OptionError, "the class 'a' stands twice"),
        ({"num_classes": None, "classes": []}, OptionError, "classes is empty"),
        ({"num_classes": None, "classes": "ab"}, OptionError,
         "classes is 'ab', expected a list of names"),
        ({"in_chans": 0}, OptionError, "in_chans is 0, expected 1 or more"),
        ({"rate": 1}, OptionError, "no option is called 'rate'"),
        ({"activation": "rellu"}, OptionError, "did you mean 'relu'"),
        ({"pretrained": True, "name": "mnist_cnn"}, WeightsError, "no published weights"),
        ({"name": "resnet81"}, UnknownName, "no backbone is called 'resnet81'; did you mean"),
        ({"name": "hf-hub:"}, UnknownName, "nothing follows the colon"),
    ])
    def test_mistakes_are_named(
        self, arguments: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            build(**{"name": "test_vit", **arguments})


class TestEveryFusion:
    @pytest.mark.parametrize("strategy", ["average", "ties", "concat", "gated", "attention", "aff",
                                          "mean", "weighted"])
    def test_members_are_copied_and_never_changed(self, strategy: str) -> None:
        members = [build("test_resnet", seed=seed).train() for seed in (1, 2)]
        members[0].requires_grad_(False)
        base = build("test_resnet") if strategy == "ties" else None
        given = [*members, *([base] if base else [])]
        before = [(state(m), [p.requires_grad for p in m.parameters()],
                   [module.training for module in m.modules()], copy.deepcopy(m.recipe), m.classes,
                   m.describe()) for m in given]
        generator = torch.get_rng_state()
        fused = quietly(members, strategy, base=base, data=labelled())
        assert torch.equal(torch.get_rng_state(), generator)
        for parameter in fused.parameters():
            parameter.data.zero_()
        for model, (tensors, grads, modes, recipe, classes, told) in zip(
                given, before, strict=True):
            assert all(torch.equal(tensors[key], now) for key, now in model.state_dict().items())
            assert [p.requires_grad for p in model.parameters()] == grads
            assert [module.training for module in model.modules()] == modes
            assert (model.recipe, model.classes, model.describe()) == (recipe, classes, told)
        assert not any(module.training for module in fused.modules())

    @pytest.mark.parametrize("strategy", ["average", "concat", "gated", "attention", "aff", "mean"])
    def test_one_seed_gives_the_same_bytes_also_from_names(self, strategy: str) -> None:
        one, other = (quietly(["test_resnet", "test_resnet"], strategy, pretrained=False, seed=5,
                              image_size=32, num_classes=1000, device="cpu") for _ in range(2))
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[key])
                   for key, tensor in one.state_dict().items())

    @pytest.mark.parametrize(("members", "strategy", "arguments", "error", "message"), [
        ("test_vit", "mean", {}, FusionError,
         "the members are 'test_vit', expected a list of models, names, paths or addresses"),
        ([nn.Linear(1, 1), "test_vit"], "mean", {}, FusionError,
         "member 1 is a Linear, expected a zoo.Model, a name, a path or an address"),
        (2, "mean", {"base": 3}, FusionError, "the base is 3, expected a zoo.Model"),
        (1, "mean", {}, FusionError, "it takes at least 2, and 1 are given"),
        (1, "average", {}, FusionError, "it takes at least 2, and 1 are given"),
        (1, "concat", {}, FusionError, "it takes at least 2, and 1 are given"),
        (2, "wise_ft", {"base": "test_vit"}, FusionError, "it takes exactly 1, and 2 are given"),
        (2, "ties", {}, FusionError, "none is given. Pass base="),
        (2, "average", {"base": "test_vit"}, OptionError,
         "it does not use a base; leave base= out"),
        (2, "concat", {"base": "test_vit"}, OptionError, "it does not use a base"),
        (2, "mean", {"weight": [1, 2]}, OptionError, "weight belongs to fusions of weights"),
        (2, "mean", {"norms": "pooled"}, OptionError, "norms belongs to fusions of weights"),
        (2, "average", {"norms": "best"}, OptionError,
         "norms is 'best', expected auto or pooled or reestimated or repair"),
        (2, "mean", {"num_classes": 7}, OptionError,
         "the members keep their heads, for 4 classes.*fuse features to get a new head"),
        (2, "average", {"classes": LETTERS}, OptionError, "the members keep their heads"),
        (2, "mean", {"image_size": 64}, OptionError, "image_size is for members that are names"),
        (2, "mean", {"dtype": "fp23"}, OptionError, "'fp23' is no floating type"),
        (2, "mean", {"density": 1}, OptionError, "no option is called 'density'"),
        (2, "mena", {}, UnknownName, "no fusion is called 'mena'; did you mean 'mean'"),
        (2, "resnet18", {}, UnknownName, "is a backbone"),
    ])
    def test_mistakes_are_named(
        self, members: Any, strategy: str, arguments: dict[str, Any], error: type[Exception],
        message: str,
    ) -> None:
        if isinstance(members, int):
            members = [build(seed=seed) for seed in range(members)]
        with pytest.raises(error, match=message):
            zoo.fuse(members, strategy, **arguments)


class TestWeights:
    def test_the_result_is_one_network_in_the_middle(self) -> None:
        one, other = build(seed=1), build(seed=2)
        fused = zoo.fuse([one, other], "average")
        for key, tensor in fused.state_dict().items():
            assert torch.allclose(tensor, (one.state_dict()[key] + other.state_dict()[key]) / 2)
        assert fused.kind == "single"
        assert str(fused.fusion) == fused.name == "zoo/average"
        with torch.no_grad():
            assert fused(images()).shape == (2, 4)

    def test_heads_of_other_labels_are_joined(self) -> None:
        one, other = build(seed=1, num_classes=None, classes=["a", "b", "c"]), build(
            seed=2, num_classes=None, classes=["d", "b"])
        for strategy, base in (("average", None), ("task_arithmetic", build(seed=3))):
            fused = zoo.fuse([one, other], strategy, base=base)
            assert fused.classes == ("a", "b", "c", "d")
            heads = [next(model.each_member()).net.head.weight for model in (one, other, fused)]
            expected = [heads[0][0], (heads[0][1] + heads[1][1]) / 2, heads[0][2], heads[1][0]]
            assert torch.allclose(heads[2], torch.stack(expected))
            with torch.no_grad():
                assert fused(images()).shape == (2, 4)
        nets = [build("test_resnet", seed=seed, num_classes=None, classes=classes)
                for seed, classes in ((1, ["0", "1"]), (2, ["2", "3"]))]
        joined = zoo.fuse(nets, "average", data=labelled())  # batch norm sees labels of both
        assert joined.classes == ("0", "1", "2", "3")
        again = zoo.fuse([fused, one], "average")  # the result of a fusion is a member of the next
        assert again.classes == fused.classes

    def test_heads_are_matched_by_name(self) -> None:
        one, other = build(classes=LETTERS), build(classes=LETTERS[::-1])
        with torch.no_grad():
            for tensor in other.head_parameters():
                tensor.copy_(tensor.flip(0))
        fused = zoo.fuse([one, other], "average")
        with torch.no_grad():
            assert torch.allclose(fused(images()), one(images()), atol=1e-6)

    @pytest.mark.parametrize("strategy", ["task_arithmetic", "ties", "wise_ft"])
    @pytest.mark.parametrize("as_path", [False, True])
    def test_a_base_is_a_model_or_a_path(
        self, strategy: str, as_path: bool, tmp_path: Path
    ) -> None:
        base, members = build(), [build(seed=1)]
        options = {"ties": {"density": 1.0}, "wise_ft": {"alpha": 1.0}}.get(strategy, {})
        given: Model | Path = zoo.save(base, tmp_path / "base") if as_path else base
        fused = zoo.fuse(members, strategy, base=given, **options)
        for key, tensor in fused.state_dict().items():
            assert torch.allclose(tensor, members[0].state_dict()[key], atol=1e-6)
        assert fused.recipe["base"]["name"] == "timm/test_vit.r160_in1k"

    def test_a_base_with_other_classes_leaves_the_heads_averaged(self) -> None:
        members = [build(seed=1), build(seed=2)]
        fused = zoo.fuse(members, "task_arithmetic", base=build(num_classes=1000), scale=0.0)
        heads = [list(model.head_parameters()) for model in (fused, *members)]
        for mean, one, other in zip(*heads, strict=True):
            assert torch.allclose(mean, (one + other) / 2, atol=1e-6)

    @pytest.mark.parametrize(("members", "message"), [
        (lambda: [build("test_vit"), build("test_resnet")],
         "timm/test_vit.r160_in1k and timm/test_resnet.r160_in1k differ in their architecture, and "
         "weights fuse only within one architecture. 'concat' and 'gated'"),
        (lambda: [build(), build(activation="relu")],
         r"\(member 1\) is timm/test_vit and .* \(member 2\) is timm/test_vit with relu"),
        (lambda: [build(), zoo.fuse([build(), build()], "mean")],
         "zoo/mean is itself a fusion.*Fuse the weights of its members first, or use 'concat'"),
    ])
    def test_unlike_models_are_refused_with_what_would_work(
        self, members: Callable[[], list[Model]], message: str
    ) -> None:
        with pytest.raises(FusionError, match=message):
            zoo.fuse(members(), "average")

    def test_other_channels_are_refused_naming_the_tensor(self) -> None:
        with pytest.raises(ShapeMismatch, match="They take 3 and 1 input channels"):
            zoo.fuse([build(), build(in_chans=1)], "average")

    def test_a_base_of_another_architecture_is_refused(self) -> None:
        with pytest.raises(FusionError, match=r"the base timm/test_resnet.r160_in1k is "
                           r"timm/test_resnet and the members are timm/test_vit"):
            zoo.fuse([build(), build()], "ties", base=build("test_resnet"))

    def test_members_that_normalise_differently_are_fused_with_a_warning(self) -> None:
        other = build(seed=1)
        member = next(other.each_member())
        assert member.preprocessing
        member.preprocessing = type(member.preprocessing)((0.1,) * 3, (0.2,) * 3, (32, 32))
        with pytest.warns(UserWarning, match="the members normalise images differently") as seen:
            zoo.fuse([build(), other], "average")
        assert seen[0].filename == __file__


class TestNorms:
    def test_pooling_warns_where_there_is_batch_norm_and_no_data(self) -> None:
        members = [build("test_resnet", seed=seed) for seed in (1, 2)]
        with pytest.warns(UserWarning, match="statistics were pooled.*pass data=") as seen:
            fused = zoo.fuse(members, "average")
        assert seen[0].filename == __file__
        assert next(fused.each_member()).norms == "pooled"
        zoo.fuse(members, "average", norms="pooled")  # asked for: no warning, which is an error
        zoo.fuse([build(), build()], "average")

    def test_reestimated_statistics_are_those_of_the_images(self) -> None:
        members = [build("test_resnet", seed=seed) for seed in (1, 2)]
        fused = zoo.fuse(members, "average", norms="reestimated", data=labelled(16))
        stem: Any = next(m for m in fused.modules() if isinstance(m, nn.BatchNorm2d))
        seen: list[Tensor] = []
        hook = stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            fused(labelled(16).tensors[0])
        hook.remove()
        assert torch.allclose(stem.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
        assert next(fused.each_member()).norms == "reestimated"
        with pytest.raises(OptionError, match="norms='reestimated' needs images; pass data="):
            zoo.fuse(members, "average", norms="reestimated")

    @pytest.mark.parametrize(("scores", "better"), [
        ((0.5, 0.4, 0.4), "pooled"), ((0.5, 0.5, 0.5), "reestimated"),
        ((0.4, 0.5, 0.6), "repaired"),
    ])
    def test_auto_takes_what_is_better_on_held_out_data(
        self, scores: tuple[float, ...], better: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The score says which; the network must then be that one."""
        left = [(score, 0.0) for score in scores]
        held: list[int] = []

        def score(model: Model, data: Any) -> tuple[float, float]:
            held.append(len(data))
            return left.pop(0)

        monkeypatch.setattr("zoo.assembly.given.accuracy", score)
        members = [build("test_resnet", seed=seed) for seed in (1, 2)]
        fused = zoo.fuse(members, "average", data=labelled(16))
        pooled = zoo.fuse(members, "average", norms="pooled")
        assert held == [8, 8, 8]
        assert next(fused.each_member()).norms == better

        def same(*parts: str) -> bool:
            return all(torch.equal(tensor, pooled.state_dict()[key])
                       for key, tensor in fused.state_dict().items() if key.endswith(parts))

        assert same("running_mean", "running_var") == (better == "pooled")
        assert same("weight", "bias") == (better != "repaired")

    def test_repair_keeps_what_frozen_batch_norm_computes(self) -> None:
        """A network's own statistics are not those of its activations: new ones change what it
        computes, repair of two copies does not."""
        member = build("test_resnet", seed=1)
        for norm in member.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
        data = labelled(16)
        repaired, changed = (zoo.fuse([member, member], "average", norms=norms, data=data)
                             for norms in ("repair", "reestimated"))
        with torch.no_grad():
            wanted, *found = [model(data.tensors[0]) for model in (member, repaired, changed)]
        assert (found[0] - wanted).abs().max() < 0.01 * (found[1] - wanted).abs().max()
        assert next(repaired.each_member()).norms == "repaired"

    @pytest.mark.parametrize(("strategy", "members", "data", "message"), [
        ("average", 2, None, "norms='repair' needs images; pass data="),
        ("rebasin", 2, None, "norms='repair' needs images; pass data="),
        ("swa", 1, labelled, "norms='repair' needs two members or more; 'reestimated' and"),
        ("zipit", 2, labelled, "norms='repair' needs members that stay as they are, and zoo/zipit"),
        ("greedy_soup", 2, labelled, "members with known shares, and zoo/greedy_soup chooses"),
        ("mean", 2, None, "norms belongs to fusions of weights"),
    ])
    def test_what_cannot_be_repaired_is_said_before_any_work(
        self, strategy: str, members: int, data: Any, message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            zoo.fuse(["timm/test_resnet"] * members, strategy, norms="repair",
                     data=data and data(4))
        with pytest.raises(OptionError, match="norms is 'repair' and the option 'repair' is false"):
            zoo.fuse(["timm/test_resnet"] * 2, "rebasin", norms="repair", repair=False)

    def test_without_batch_norm_auto_looks_only_between_basins(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[Any] = []
        monkeypatch.setattr("zoo.assembly.given.load_data",
                            lambda data, **_: opened.append(data) or load_data(data))
        data = labelled(16)
        zoo.fuse([build(seed=1), build(seed=1)], "average", data=data)
        assert not opened
        zoo.fuse([build(seed=1), build(seed=2)], "average", data=data)
        assert len(opened) == 1


class TestFeatures:
    def test_members_give_their_features_and_lose_their_heads(self) -> None:
        members = [build("test_vit"), build("test_resnet")]
        fused = zoo.fuse(members, "concat", classes=["x", "y"])
        assert fused.classes == ("x", "y")
        assert fused.dim == members[0].dim + members[1].dim
        for before, member in zip(members, fused.each_member(), strict=True):
            assert not list(member.head_parameters())
            with torch.no_grad():
                assert torch.equal(member.features(images()), before.embed(images()))

    def test_classes_are_the_common_ones_or_those_asked_for(self) -> None:
        one, other = build(classes=LETTERS), build("test_resnet", classes=LETTERS[::-1])
        assert zoo.fuse([one, other], "concat").classes == LETTERS
        assert zoo.fuse([one, other], "concat", num_classes=4).classes == LETTERS
        assert zoo.fuse([one, other], "concat", num_classes=2).classes == ("0", "1")
        with pytest.raises(OptionError, match="have different classes; pass num_classes="):
            zoo.fuse([one, build()], "concat")

    def test_images_that_no_member_shares_are_refused(self) -> None:
        zoo.fuse([build(in_chans=1), build()], "concat")
        with pytest.raises(FusionError, match=r"images of 3 and 5 channels.*the same in_chans"):
            zoo.fuse([build(in_chans=5), build()], "concat")

    def test_fusions_nest(self) -> None:
        inner = zoo.fuse([build(), build("test_resnet")], "concat")
        outer = zoo.fuse([inner, build("test_convnext")], "gated")
        with torch.no_grad():
            assert torch.equal(next(outer.each_member()).features(images()), inner.embed(images()))


class TestOutputs:
    def test_weighted_learns_from_data_in_the_models_order_of_classes(self) -> None:
        good, bad = build("mnist_cnn", classes=LETTERS[::-1]), build("mnist_cnn", classes=LETTERS)
        with torch.no_grad():
            for model in (good, bad):
                for parameter in model.head_parameters():
                    parameter.zero_()
            labels = labelled()
            # Linear regression on the features of the good one, whose classes run backwards.
            x = torch.cat([good.embed(labels.tensors[0]), torch.ones(32, 1)], 1)
            wanted = torch.eye(4).flip(1)[labels.tensors[1]]
            solution = torch.linalg.lstsq(x, 20 * wanted).solution
            head = list(good.head_parameters())
            head[0].copy_(solution[:-1].T)
            head[1].copy_(solution[-1])
        named = _Named(labels, LETTERS)
        fused = zoo.fuse([bad, good], "weighted", data=named)
        fuser: Any = fused.fuser
        assert fuser.weights[1] > 0.9
        assert zoo.evaluate(fused, named).accuracy == 1.0
        assert fused.recipe["fitted_on"]["images"] == 32

    def test_unfitted_use_says_what_to_do(self, tmp_path: Path) -> None:
        fused = zoo.fuse([build(), build()], "weighted")
        zoo.save(fused, tmp_path / "m")
        for model in (fused, zoo.load(tmp_path / "m", device="cpu")):
            with pytest.raises(NotFitted, match=r"fuse\(…, 'weighted', data=…\)"):
                model(images())


class _Named(TensorDataset):
    def __init__(self, data: TensorDataset, classes: tuple[str, ...]) -> None:
        super().__init__(*data.tensors)
        self.classes = classes


def test_the_recipe_says_where_everything_comes_from() -> None:
    one, other = build(seed=1), build(seed=2)
    fused = zoo.fuse([one, other], "average", weight=[1, 3], seed=7)
    assert fused.recipe["strategy"] == "zoo/average"
    assert fused.recipe["seed"] == 7
    assert fused.recipe["weight"] == [1, 3]
    hashes = [source["state_sha256"] for source in fused.recipe["sources"]]
    assert len(set(hashes)) == 2
    nested = zoo.fuse([fused, build("test_resnet")], "mean")
    assert nested.recipe["sources"][0]["recipe"] == fused.recipe


@pytest.mark.parametrize(("network", "size", "other"), [
    ("timm/test_vit", 64, 96), ("timm/test_resnet", 64, 48), ("zoo/mnist_cnn", 28, 28),
])
def test_a_saved_network_looks_at_another_size(
    tmp_path: Path, network: str, size: int, other: int
) -> None:
    first = zoo.backbone(network, num_classes=3, image_size=size, seed=0)
    zoo.save(first, tmp_path / "first")
    again = zoo.backbone(f"local-dir:{tmp_path / 'first'}", image_size=other)
    assert again.image_size == other
    x = torch.rand(2, 3, other, other)
    assert again(x).shape == (2, 3)
    zoo.save(again, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(zoo.load(tmp_path / "again")(x), again(x))
        both = zoo.fuse([again, first], "concat")
        zoo.save(both, tmp_path / "both")
        assert torch.equal(zoo.load(tmp_path / "both")(x), both(x))


def test_a_size_that_a_saved_network_cannot_take_is_refused(tmp_path: Path) -> None:
    zoo.save(zoo.backbone("zoo/mnist_cnn", num_classes=3, seed=0), tmp_path / "cnn")
    with pytest.raises(OptionError, match="image_size is 64, and the network cannot look at"):
        zoo.backbone(tmp_path / "cnn", image_size=64)
    both = zoo.fuse([zoo.backbone("zoo/mnist_cnn", seed=seed) for seed in (0, 1)], "mean")
    zoo.save(both, tmp_path / "both")
    with pytest.raises(OptionError, match="it has several members; leave it out"):
        zoo.backbone(tmp_path / "both", image_size=64)


def test_members_of_other_image_sizes_are_fused_at_the_first_ones() -> None:
    first, other = (zoo.backbone("timm/test_vit", num_classes=3, image_size=size, seed=seed,
                                 device="cpu") for seed, size in ((1, 32), (2, 64)))
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.warns(UserWarning, match="member 2 looks at 64 × 64 pixels; its position "
                                         "embeddings were resampled to the first member's 32 × 32"):
        fused = zoo.fuse([first, other], "average", weight=[0, 1])
    assert fused.image_size == 32
    key = "members.0.net.pos_embed"
    expected = resample_abs_pos_embed(before[key], [2, 2], num_prefix_tokens=1)
    assert torch.allclose(fused.state_dict()[key], expected, atol=1e-6)
    assert all(torch.equal(before[key], tensor) for key, tensor in other.state_dict().items())
    assert fused.recipe["sources"][1]["state_sha256"] == digest(
        next(other.each_member()).net.state_dict())
    with pytest.warns(UserWarning, match="the base looks at 64 × 64 pixels"):
        zoo.fuse([first, first], "ties", base=other)
    assert zoo.plan([first, other]).verdict("average").outlook != "not possible"
    halves = [copy.deepcopy(model).to(dtype=torch.bfloat16) for model in (first, other)]
    with pytest.warns(UserWarning, match="member 2 looks at"):
        assert zoo.fuse(halves, "average").image_size == 32


@pytest.mark.parametrize("seed", ["1", 1.5, 2**64])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(OptionError, match="is no seed, expected a whole number below"):
        zoo.backbone("zoo/mnist_cnn", num_classes=3, seed=seed, device="cpu")
