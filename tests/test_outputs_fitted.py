"""What fitting on held-out data promises: temperatures, greedy selection, stacking, the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_outputs_fusion import features, held_out, nll
from torch import Tensor
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import DataError, OptionError, ZooError
from zoo.fusion.outputs.gate import Gate
from zoo.fusion.outputs.geometric import Geometric
from zoo.fusion.outputs.greedy_selection import GreedySelection
from zoo.fusion.outputs.max import Max
from zoo.fusion.outputs.mean import Mean
from zoo.fusion.outputs.stacking import Stacking
from zoo.fusion.outputs.vote import Vote
from zoo.fusion.outputs.weighted import Weighted

SKILLS = [((3.0, 1.0, 0.0), (1.0, 5.0, 2.0)), ((2.0, 2.0, 2.0), (0.2, 1.0, 9.0)),
          ((9.0, 0.0, 0.0), (1.0, 9.0, 9.0)), ((-2.0, 0.0, 0.1), (4.0, 1.0, 1.0))]
each = pytest.mark.parametrize(("skill", "heat"), SKILLS)


def accuracy(answer: Tensor, labels: Tensor) -> float:
    return (answer.argmax(1) == labels).double().mean().item()


class TestTemperatures:
    def test_each_member_gets_its_own(self) -> None:
        """Labels drawn from softmaxes whose logits are then made too large, or too small."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20_000, 4, generator=generator)
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        for build in (Mean, Geometric, Max):
            fuser = build(2, 4, calibrate=True)
            told = fuser.fit(torch.stack([5 * logits, logits / 2]), labels)
            assert fuser.temperatures.tolist() == pytest.approx([5, 0.5], rel=0.05)
            assert told["temperatures"] == pytest.approx([5, 0.5], rel=0.05)
            assert set(fuser.state_dict()) >= {"temperatures", "fitted"}

    @each
    def test_the_pool_is_recalibrated(
        self, skill: tuple[float, ...], heat: tuple[float, ...]
    ) -> None:
        logits, labels = held_out(skill=skill, heat=heat)
        for build in (Mean, Geometric, Max, Vote, Weighted):
            plain, pooled = build(3, 4), build(3, 4, recalibrate=True)
            if hasattr(plain, "fit"):
                plain.fit(logits, labels)
            pooled.fit(logits, labels)
            found = nll(pooled(logits), labels)
            assert found <= nll(plain(logits), labels) + 1e-6
            likeliest = min(nll((plain(logits) / t).log_softmax(1), labels)
                            for t in torch.logspace(-2, 2, 200))
            assert found <= likeliest + 1e-4
            assert torch.equal(pooled(logits).argmax(1), plain(logits).argmax(1))

    def test_a_pool_of_calibrated_members_is_unsure_of_itself(self) -> None:
        """Wu and Gales 2021: so it takes a temperature below one."""
        logits, labels = held_out(count=2000, skill=(2.0, 2.0, 2.0), heat=(3.0, 3.0, 3.0))
        fuser = Mean(3, 4, calibrate=True, recalibrate=True)
        fuser.fit(logits, labels)
        assert (fuser.temperatures > 1.3).all()
        assert fuser.pool_temperature < 0.8


class TestGreedySelection:
    @each
    @pytest.mark.parametrize("options", [
        {}, {"metric": "accuracy"}, {"start": "none", "bags": 1, "share": 1.0},
        {"start": 2, "rounds": 1}, {"start": "none", "share": 0.01, "bags": 3},
    ])
    def test_never_loses_to_the_best_single(
        self, skill: tuple[float, ...], heat: tuple[float, ...], options: dict[str, Any]
    ) -> None:
        logits, labels = held_out(skill=skill, heat=heat)
        fuser = GreedySelection(3, 4, **options)
        fuser.fit(logits, labels)
        answer, singles = fuser(logits), [one.log_softmax(1) for one in logits]
        if options.get("metric") == "accuracy":
            assert accuracy(answer, labels) >= max(accuracy(one, labels) for one in singles)
        else:
            assert nll(answer, labels) <= min(nll(one, labels) for one in singles) + 1e-6
        assert fuser.counts.sum() >= 1

    def test_without_bags_it_is_the_greedy_walk_of_the_paper(self) -> None:
        """Against the walk written out: start with the best, add whoever makes the mean best."""
        logits, labels = held_out(3, members=6, skill=(1.0, 1.5, 0.5, 2.0, 1.8, 0.0),
                                  heat=(1.0, 2.0, 1.0, 3.0, 0.5, 1.0))
        probabilities = logits.double().softmax(2)

        def loss(picks: list[int]) -> float:
            return nll(probabilities[picks].mean(0).log(), labels)

        picks = [min(range(6), key=lambda member: loss([member]))]
        walk = [picks]
        for _ in range(10):
            picks = [*picks, min(range(6), key=lambda member: loss([*picks, member]))]
            walk.append(picks)
        best = min(walk, key=loss)
        fuser = GreedySelection(6, 4, bags=1, share=1.0, rounds=10)
        fuser.fit(logits, labels)
        assert fuser.counts.tolist() == [best.count(member) for member in range(6)]
        assert max(fuser.counts) > 1, "with replacement"
        torch.testing.assert_close(fuser(logits).double(), probabilities[best].mean(0).log(),
                                   atol=1e-5, rtol=1e-5)

    def test_the_recipe_tells_the_counts(self, tmp_path: Path) -> None:
        members = [zoo.backbone("zoo/mnist_cnn", num_classes=4, image_size=8, seed=seed,
                                device="cpu") for seed in range(3)]
        data = TensorDataset(torch.rand(32, 3, 8, 8), torch.arange(32) % 4)
        fused = zoo.fuse(members, "greedy_selection", data=data, seed=1)
        again = zoo.fuse(members, "greedy_selection", data=data, seed=1)
        counts = fused.recipe["fitted"]["counts"]
        assert counts == fused.fuser.counts.tolist() == again.recipe["fitted"]["counts"]
        zoo.save(fused, tmp_path / "model")
        assert zoo.load(tmp_path / "model").recipe["fitted"]["counts"] == counts

    @pytest.mark.parametrize(("options", "message"), [
        ({"metric": "f1"}, "metric is 'f1', expected 'nll' or 'accuracy'"),
        ({"bags": 0}, "bags is 0, expected 1 or more"),
        ({"share": 1.5}, r"share is 1.5, expected a part in \(0, 1\]"),
        ({"rounds": 0}, "rounds is 0, expected 1 or more"),
        ({"start": 0}, "start is 0, expected 'best', 'none' or 1 or more"),
        ({"start": "worst"}, "start is 'worst'"),
    ])
    def test_options_that_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=f"greedy_selection: {message}"):
            GreedySelection(3, 4, **options)


class TestStacking:
    @each
    def test_out_of_fold_it_never_loses_to_the_mean(
        self, skill: tuple[float, ...], heat: tuple[float, ...]
    ) -> None:
        logits, labels = held_out(skill=skill, heat=heat)
        for weights in ("member", "class"):
            told = Stacking(3, 4, weights=weights).fit(logits, labels)
            assert told["mean_nll"] == pytest.approx(nll(Mean(3, 4)(logits), labels), abs=1e-5)
            assert told["out_of_fold_nll"] <= told["mean_nll"] + 1e-9

    def test_it_learns_what_a_mean_cannot(self) -> None:
        """A member that is always wrong in one way is worth as much as one that is right."""
        logits, labels = held_out(count=600, skill=(-3.0, 0.0), members=2, heat=(1.0, 1.0))
        fuser = Stacking(2, 4)
        fuser.fit(logits, labels)
        test, truth = held_out(1, count=600, skill=(-3.0, 0.0), members=2, heat=(1.0, 1.0))
        assert fuser.weights[0, 0] < -0.5
        assert fuser.share == 1
        assert nll(fuser(test), truth) < nll(Mean(2, 4)(test), truth) - 0.3

    def test_a_weight_for_each_class_tells_who_knows_which(self) -> None:
        """Each of two members knows half of the classes, and confuses the rest."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(4, (1200,), generator=generator)
        logits = torch.randn(2, 1200, 4, generator=generator)
        for member, known in enumerate(((0, 1), (2, 3))):
            for label in known:
                logits[member, labels == label, label] += 4
            logits[member, :, [c for c in range(4) if c not in known]] *= 3
        losses = {}
        for weights in ("member", "class"):
            fuser = Stacking(2, 4, weights=weights)
            fuser.fit(logits[:, :600], labels[:600])
            losses[weights] = nll(fuser(logits[:, 600:]), labels[600:])
        assert losses["class"] < losses["member"] - 0.02

    def test_with_nothing_to_learn_it_is_the_plain_mean(self) -> None:
        """Labels that the members know nothing of, and few: what a regression finds is noise."""
        shares = []
        for seed in range(4):
            logits, labels = held_out(seed, count=12, skill=(0.0, 0.0, 0.0), heat=(0.1, 0.1, 0.1))
            fuser = Stacking(3, 4, weights="class", l2=0.001)
            told = fuser.fit(logits, labels)
            shares.append(told["share"])
            if told["share"] == 0:
                torch.testing.assert_close(fuser(logits), Mean(3, 4)(logits))
        assert shares.count(0.0) >= 2

    def test_one_image_is_too_little_for_a_regression(self) -> None:
        logits, labels = held_out(count=1)
        fuser = Stacking(3, 4)
        fuser.fit(logits, labels)
        torch.testing.assert_close(fuser(logits), Mean(3, 4)(logits))

    @pytest.mark.parametrize(("options", "message"), [
        ({"weights": "all"}, "weights is 'all', expected 'member' or 'class'"),
        ({"folds": 1}, "folds is 1, expected 2 or more"),
        ({"l2": 0.0}, "l2 is 0, expected a penalty above 0"),
    ])
    def test_options_that_cannot_be(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=f"stacking: {message}"):
            Stacking(3, 4, **options)


def sided(seed: int, count: int = 800) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Two members, each good on its side of a feature, and noise on the other; both are sure."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    side = torch.randn(count, generator=generator)
    logits = 3 * torch.randn(2, count, 4, generator=generator)
    right = 8 * torch.nn.functional.one_hot(labels, 4)
    logits[0] += right * (side > 0)[:, None]
    logits[1] += right * (side <= 0)[:, None]
    noise = torch.randn(count, 2, generator=generator)
    return logits, labels, [torch.cat([100 + side[:, None], noise], 1), noise]


class TestGate:
    @pytest.mark.parametrize("hidden", [0, 8])
    def test_it_finds_out_whom_to_ask_where(self, hidden: int) -> None:
        logits, labels, given = sided(0)
        fuser = Gate(2, 4, dims=[3, 2], hidden=hidden, lr=0.02)
        torch.manual_seed(0)
        fuser.fit(logits, labels, features=given)
        test, truth, seen = sided(1)
        best = min(nll(one.log_softmax(1), truth) for one in test)
        assert nll(fuser(test, seen), truth) < 0.75 * min(nll(Mean(2, 4)(test), truth), best)

    def test_on_the_part_held_out_it_never_loses_to_the_mean(self) -> None:
        for skill, heat in SKILLS:
            logits, labels = held_out(skill=skill, heat=heat)
            told = Gate(3, 4, dims=[5] * 3, lr=1.0).fit(logits, labels, features(logits))
            assert told["held_out_nll"] <= told["held_out_nll_of_the_mean"]

    def test_noise_leaves_the_weights_equal(self) -> None:
        logits, labels = held_out(skill=(1.0, 1.0, 1.0), heat=(1.0, 1.0, 1.0), count=40)
        fuser = Gate(3, 4, dims=[50] * 3, lr=3.0, patience=3)
        noise = [torch.randn(40, 50, generator=torch.Generator().manual_seed(n)) for n in range(3)]
        told = fuser.fit(logits, labels, noise)
        assert told["epoch"] == 0
        torch.testing.assert_close(fuser(logits, noise), Mean(3, 4)(logits))

    def test_what_it_cannot_be_given(self) -> None:
        fuser = Gate(2, 4, dims=[3, 2])
        logits, labels, given = sided(0)
        with pytest.raises(DataError, match=r"1 images are too few to hold a part of 0.25 out"):
            fuser.fit(logits[:, :1], labels[:1], [part[:1] for part in given])
        with pytest.raises(ZooError, match=r"given none, expected one \[B, D\] of each: \[3, 2"):
            fuser.fit(logits, labels)
        with pytest.raises(DataError, match="some features are not finite"):
            fuser.fit(logits, labels, [given[0] / 0, given[1]])
        fuser.fit(logits, labels, given)
        with pytest.raises(ZooError, match=r"was given of widths \[2, 3\]"):
            fuser(logits, given[::-1])

    @pytest.mark.parametrize("option", ["hidden", "epochs", "lr", "weight_decay", "patience",
                                        "held_out"])
    def test_options_that_cannot_be(self, option: str) -> None:
        with pytest.raises(OptionError, match=f"gate: {option} is -1, expected"):
            Gate(2, 4, dims=[3, 2], **{option: -1})

    @pytest.mark.parametrize("other", ["timm/test_vit", "timm/deit_tiny_distilled_patch16_224"])
    def test_a_model_gives_it_features_wherever_it_asks_for_an_answer(
        self, other: str, tmp_path: Path
    ) -> None:
        """Also of networks whose logits are more than a classifier's answer to their features."""
        members = [zoo.backbone(name, num_classes=4, image_size=32, seed=0, device="cpu")
                   for name in ("zoo/mnist_cnn", other)]
        assert members[1].splits == (other == "timm/test_vit")
        data = TensorDataset(torch.rand(32, 3, 32, 32), torch.arange(32) % 4)
        fused = zoo.fuse(members, "gate", data=data, lr=0.1)
        fuser: Any = fused.fuser
        assert fuser.dims == tuple(member.dim for member in members)
        with torch.no_grad():
            fuser.outer.normal_(0, 0.1)
            images = data.tensors[0][:4]
            given = [member.embed(images) for member in members]
            wanted = fuser(torch.stack([member(images) for member in members]), given)
            torch.testing.assert_close(fused(images), wanted)
            zoo.save(fused, tmp_path / "model")
            assert torch.equal(zoo.load(tmp_path / "model", device="cpu")(images), fused(images))
