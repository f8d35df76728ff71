"""strategy="auto": what it tries, what it takes, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.assembly import automatic
from zoo.assembly.contenders import legal, wanted
from zoo.cli import main
from zoo.datasets import ImageData
from zoo.errors import DataError, FusionError, OptionError, RecipeError, ZooError
from zoo.model import Model

Install = Callable[..., Path]
CLASSES = 4


def images(count: int = 80, seed: int = 0) -> ImageData:
    """Bright bars whose place is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.5 * torch.rand(count, 1, 8, 8, generator=generator)
    for place, label in enumerate(labels.tolist()):
        pixels[place, :, 2 * label:2 * label + 2] += 0.15
    return ImageData(pixels.clamp(0, 1), labels)


def net(seed: int = 0, classes: int = CLASSES) -> Model:
    return zoo.backbone("zoo/mnist_cnn", num_classes=classes, image_size=8, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def trained() -> list[Model]:
    """Two networks that are right about half of the time."""
    models = [net(seed) for seed in (0, 1)]
    for seed, model in enumerate(models):
        zoo.transfer(model, images(60, seed=10 + seed), "finetune", epochs=4, seed=seed)
    return models


def chosen(model: Model) -> dict[str, Any]:
    return next(row for row in model.recipe["auto"]["ranking"] if row["chosen"])


def accuracy(model: Model, data: ImageData) -> float:
    return zoo.evaluate(model, data).accuracy


def test_the_whole_ranking_and_the_reason_are_in_the_recipe(trained: list[Model]) -> None:
    best = zoo.fuse(trained, "auto", data=images(40), trials=6, head_epochs=2, strategies=[
        "zoo/mean", "weighted", "concat", "gated", "rebasin", "ties"])
    told = best.recipe["auto"]
    json.dumps(told, allow_nan=False)
    names = [row["name"] for row in told["ranking"]]
    assert {"member 1 (zoo/mnist_cnn)", "member 2 (zoo/mnist_cnn)", "zoo/mean",
            "zoo/weighted"} <= set(names)
    assert {row["kind"] for row in told["ranking"]} >= {"single", "outputs", "features"}
    assert len([row for row in told["ranking"] if row["kind"] != "single"]) == 6
    for row in told["ranking"]:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
        assert row["seconds"] >= 0
    assert chosen(best)["name"] == told["chosen"]
    assert told["reason"].startswith(f"Of {sum(row['finished'] for row in told['ranking'])} cand")
    assert told["images"] == 40
    assert told["trials"] == 6
    assert told["not_tried"]["zoo/ties"].startswith("it works on what each member changed")


def test_never_worse_than_the_best_single_member_on_validation(trained: list[Model]) -> None:
    for seed in range(3):
        data = images(40, seed=seed)
        best = zoo.fuse(trained, "auto", data=data, seed=seed, strategies=["mean", "weighted"])
        assert chosen(best)["accuracy"] >= max(accuracy(model, data) for model in trained)


def test_an_obviously_better_fusion_is_taken_and_fitted_on_all_data(trained: list[Model]) -> None:
    data, test = images(120), images(200, seed=5)
    best = zoo.fuse(trained, "auto", data=data, strategies=["concat"], trials=1)
    assert best.fusion is not None
    assert best.fusion.strategy == best.recipe["strategy"] == "zoo/concat"
    assert accuracy(best, test) > max(accuracy(model, test) for model in trained) + 0.1
    assert best.recipe["transfers"][0]["images"] == 120
    assert not best.training


def test_what_had_no_turn_is_told(trained: list[Model]) -> None:
    best = zoo.fuse(trained, "auto", data=images(40), strategies=["mean", "vote"], trials=1)
    tried = {row["strategy"] for row in best.recipe["auto"]["ranking"]}
    (other,) = {"zoo/mean", "zoo/vote"} - tried
    assert best.recipe["auto"]["not_tried"][other] == "the trials ended before its turn"
    assert not tried & best.recipe["auto"]["not_tried"].keys()


def test_what_is_judged_was_not_learnt_from(trained: list[Model]) -> None:
    pixels, labels = images(60).batch(range(60))
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    noise = ImageData(pixels, labels[order])
    best = zoo.fuse(trained, "auto", data=noise, strategies="concat", trials=1, head_epochs=40)
    row = next(row for row in best.recipe["auto"]["ranking"] if row["kind"] == "features")
    assert row["accuracy"] < 0.45


def test_members_that_are_the_same_stay_single(trained: list[Model]) -> None:
    best = zoo.fuse([trained[0], trained[0]], "auto", data=images(),
                    strategies=["mean", "weighted", "average"])
    assert best.kind == "single"
    assert chosen(best)["kind"] == "single"
    assert best is not trained[0]
    assert torch.equal(best(torch.zeros(1, 3, 8, 8)), trained[0](torch.zeros(1, 3, 8, 8)))
    assert "auto" not in trained[0].recipe


def test_a_fusion_of_outputs_is_fitted_on_all_data(trained: list[Model]) -> None:
    data = images(200)
    best = zoo.fuse(trained, "auto", data=data, strategies="weighted", errors=0.0, trials=1)
    if best.kind == "single":
        pytest.fail(f"the test needs members that add up: {best.recipe['auto']['reason']}")
    plain = zoo.fuse(trained, "weighted", data=data)
    assert best.fuser is not None
    assert plain.fuser is not None
    torch.testing.assert_close(best.fuser.state_dict(), plain.fuser.state_dict())
    assert best.recipe["fitted_on"] == plain.recipe["fitted_on"]


def test_weights_are_fused_where_the_plan_does_not_warn() -> None:
    start = net()
    zoo.transfer(start, images(60, seed=20), "finetune", epochs=6)
    models = []
    for seed in (1, 2):
        model = zoo.fuse([start, start], "average", norms="pooled")
        zoo.transfer(model, images(40, seed=20 + seed), "finetune", epochs=1, lr=1e-4, seed=seed)
        models.append(model)
    best = zoo.fuse(models, "auto", data=images(40), strategies=["average", "slerp"], trials=3)
    rows = [row for row in best.recipe["auto"]["ranking"] if row["kind"] == "weights"]
    assert {row["strategy"] for row in rows} == {"zoo/average", "zoo/slerp"}
    assert all(row["error"] is None and row["accuracy"] > 0.3 for row in rows)


def test_of_weights_that_lie_apart_at_most_rebasin_is_tried_unasked(trained: list[Model]) -> None:
    specs, left_out = legal(trained, [0, 1], None, wanted(None), chosen=False)
    assert [spec.name for spec in specs if spec.kind == "weights"] == ["zoo/rebasin"]
    assert "lie apart" in left_out["zoo/average"]
    specs, left_out = legal(trained, [0, 1], None, wanted(["ot_fusion", "average"]), chosen=True)
    assert [spec.name for spec in specs] == ["zoo/ot_fusion"]


def test_members_without_a_head_are_probed_and_only_their_features_fused() -> None:
    models = [net(0, classes=1000), net(1, classes=1000)]
    best = zoo.fuse(models, "auto", data=images(), strategies=["concat", "mean"], head_epochs=10)
    told = best.recipe["auto"]
    kinds = {row["name"]: row["kind"] for row in told["ranking"]}
    assert kinds["member 1 (zoo/mnist_cnn), probed"] == "single"
    assert set(kinds.values()) == {"single", "features"}
    assert best.classes == ("0", "1", "2", "3")
    assert told["not_tried"]["zoo/mean"].startswith("fewer than two members have a head")
    assert accuracy(best, images(100, seed=6)) > 0.5
    assert all(len(model.classes) == 1000 for model in models)


def test_a_probed_member_can_be_the_best() -> None:
    model = net(0, classes=1000)
    best = zoo.fuse([model, model], "auto", data=images(), strategies="concat", head_epochs=10,
                    penalty=100.0)
    assert best.kind == "single"
    assert best.classes == ("0", "1", "2", "3")
    assert best.recipe["transfers"][0]["method"] == "zoo/linear_probe"


def test_members_that_know_different_classes_are_tried_together() -> None:
    models = []
    for classes in (("0", "1"), ("2", "3")):
        model = zoo.backbone("zoo/mnist_cnn", classes=classes, image_size=8, seed=0, device="cpu")
        model.recipe["name"] = "trained"
        models.append(model)
    best = zoo.fuse(models, "auto", data=images(), strategies=["average", "concat"],
                    head_epochs=10)
    rows = {row["name"]: row for row in best.recipe["auto"]["ranking"]}
    assert rows["member 1 (zoo/mnist_cnn)"]["accuracy"] <= 0.5
    assert rows["zoo/average"]["error"] is None
    assert best.recipe["strategy"] == "zoo/concat"
    assert set(best.classes) == {"0", "1", "2", "3"}


def test_data_may_lack_a_class_of_the_members() -> None:
    models = [zoo.backbone("zoo/mnist_cnn", classes=["3", "2", "1", "0", "none"], image_size=8,
                           seed=seed, device="cpu") for seed in (0, 1)]
    best = zoo.fuse(models, "auto", data=images(), strategies=["concat", "weighted"],
                    head_epochs=10)
    assert best.classes == ("3", "2", "1", "0", "none")
    assert accuracy(best, images(100, seed=6)) > 0.5


def test_a_penalty_changes_the_choice(trained: list[Model]) -> None:
    data = images(120)
    free = zoo.fuse(trained, "auto", data=data, strategies="concat")
    dear = zoo.fuse(trained, "auto", data=data, strategies="concat", penalty=100.0)
    assert free.kind == "features"
    assert dear.kind == "single"
    slow = zoo.fuse(trained, "auto", data=data, strategies="concat", penalty=100.0,
                    penalty_on="latency")
    assert slow.kind == "single"
    assert all(row["latency"] > 0 for row in slow.recipe["auto"]["ranking"])
    # Twice the parameters are one doubling: a hundred points.
    row = next(row for row in dear.recipe["auto"]["ranking"] if row["kind"] == "features")
    assert row["score"] < row["accuracy"] - 0.9


def test_with_trials_the_choice_depends_on_the_seed_alone(trained: list[Model]) -> None:
    def ranking(global_seed: int) -> list[tuple[Any, ...]]:
        torch.manual_seed(global_seed)
        best = zoo.fuse(trained, "auto", data=images(40), trials=5, seed=3, head_epochs=1,
                        strategies=["zoo/mean", "weighted", "concat", "gated", "rebasin"])
        return [(row["name"], row.get("accuracy"), row.get("nll"))
                for row in best.recipe["auto"]["ranking"]]

    assert ranking(1) == ranking(2)


def test_seconds_limit_what_is_tried(
    trained: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(automatic.time, "perf_counter", clock)
    few = zoo.fuse(trained, "auto", data=images(), budget=20.0, head_epochs=1)
    more = zoo.fuse(trained, "auto", data=images(), budget=60.0, head_epochs=1)
    tried = [len([row for row in model.recipe["auto"]["ranking"] if row["kind"] != "single"])
             for model in (few, more)]
    assert 0 < tried[0] < tried[1]
    assert few.recipe["auto"]["budget"] == 20.0
    assert few.recipe["auto"]["trials"] is None


BROKEN = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [
        zoo.FusionSpec(name="broken", build="zoo_acme:Broken", kind="outputs", summary="broken"),
        zoo.FusionSpec(name="first", build="zoo_acme:First", kind="outputs", summary="first")]

def Broken(members, num_classes):
    raise RuntimeError("out of luck")

def First(members, num_classes):
    import torch

    class First(torch.nn.Module):
        def forward(self, logits, features=None):
            return logits[0].log_softmax(1)

    return First()
'''


def test_plugins_are_tried_and_what_they_raise_is_contained(
    trained: list[Model], install: Install
) -> None:
    install("acme", BROKEN)
    best = zoo.fuse(trained, "auto", data=images(), strategies=["acme/*", "mean"])
    rows = {row["name"]: row for row in best.recipe["auto"]["ranking"]}
    assert rows["acme/broken"]["error"] == "RuntimeError: out of luck"
    assert not rows["acme/broken"]["finished"]
    assert [*rows][-1] == "acme/broken"
    assert rows["acme/first"]["accuracy"] == rows["member 1 (zoo/mnist_cnn)"]["accuracy"]


def test_where_all_fusions_fail_the_best_member_is_taken(
    trained: list[Model], install: Install
) -> None:
    install("acme", BROKEN)
    best = zoo.fuse(trained, "auto", data=images(), strategies="acme/broken")
    assert best.kind == "single"


def test_a_saved_choice_needs_no_auto(trained: list[Model], tmp_path: Path) -> None:
    best = zoo.fuse(trained, "auto", data=images(), strategies=["concat"])
    zoo.save(best, tmp_path / "best")
    loaded = zoo.load(tmp_path / "best")
    assert loaded.recipe["auto"]["chosen"] == "zoo/concat"
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), best(x))


@pytest.mark.parametrize(("given", "message"), [
    ({"budget": 5, "trials": 3}, "budget is 5.0 and trials is 3; give one of the two"),
    ({"budget": 0}, "budget is 0.0, expected more than 0 seconds"),
    ({"trials": 0}, "trials is 0, expected 1 or more"),
    ({"penalty": -1}, "penalty is -1.0, expected 0 or more"),
    ({"errors": -0.5}, "errors is -0.5, expected 0 or more"),
    ({"folds": 1}, "folds is 1, expected 2 or more"),
    ({"head_epochs": 0}, "head_epochs is 0, expected 1 or more"),
    ({"strategies": []}, "strategies is empty; leave it out"),
    ({"strategies": ["wieghted"]}, "'wieghted', and no fusion is called so; did you mean 'weight"),
    ({"strategies": "acme/*"}, "strategies has 'acme/\\*', and no fusion is called so"),
    ({"strategies": "auto"}, "strategies has 'auto', and no fusion is called so"),
    ({"penalty_on": "beauty"}, "the option 'penalty_on' is 'beauty'"),
    ({"trails": 3}, "no option is called 'trails'; did you mean 'trials'"),
    ({"num_classes": 4}, "its classes are those of the data"),
    ({"weight": [1, 2]}, "weight belongs to fusions of weights"),
    ({"search": {"trials": [1, 2]}}, "search belongs to fusions of weights"),
])
def test_wrong_options_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        zoo.fuse([net(0), net(1)], "auto", data=images(), **given)


def test_it_needs_labelled_images_and_enough_of_them() -> None:
    models = [net(0), net(1)]
    with pytest.raises(FusionError, match="it learns from held-out data, and none are given"):
        zoo.fuse(models, "auto")
    with pytest.raises(DataError, match="8 images are too few"):
        zoo.fuse(models, "auto", data=images(8))
    with pytest.raises(DataError, match="no labels"):
        zoo.fuse(models, "auto", data=images().without_labels())


def test_no_strategy_that_is_legal_is_an_error_that_says_why() -> None:
    with pytest.raises(FusionError, match="none of the strategies to try can fuse them "
                                          r"\(zoo/slerp: their weights lie apart"):
        zoo.fuse([net(0), net(1)], "auto", data=images(), strategies="slerp")


def test_the_plan_names_it_and_merge_refuses_it(tmp_path: Path) -> None:
    assert "tries the others" in zoo.plan([net(0), net(1)], data="val.csv").verdict("auto").why
    with pytest.raises(ZooError, match="files hold weights"):
        zoo.merge(["a", "b"], "auto", out=tmp_path / "out")


def test_the_command_prints_the_ranking_and_the_reason(
    tmp_path: Path, trained: list[Model], capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    data = images()
    assert data.labels is not None
    lines = ["path,label"]
    for number in range(len(data)):
        pixels = (data[number][0][0] * 255).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{int(data.labels[number])}")
    (tmp_path / "val.csv").write_text("\n".join(lines))
    for number, model in enumerate(trained):
        zoo.save(model, tmp_path / f"m{number}")
    command = ["fuse", str(tmp_path / "m0"), str(tmp_path / "m1"), "--with", "auto", "--data",
               str(tmp_path / "val.csv"), "--strategies", "[mean, weighted]", "--budget", "600",
               "-o", str(tmp_path / "best")]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert "zoo/weighted" in printed
    assert "→" in printed
    assert "candidates, " in printed
    with pytest.raises(SystemExit):
        main([*command, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ranking"]
    assert zoo.load(tmp_path / "best").recipe["auto"]["reason"] == told["reason"]


def test_show_describes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["show", "auto"])
    printed = capsys.readouterr().out
    assert "kind: choice" in printed
    assert "budget: float | None = None  seconds for trying" in printed


RECIPE: dict[str, Any] = {
    "data": {"target": {"train": {"data": "digits", "limit": 150},
                        "test": {"data": "digits", "limit": 50}, "val": 0.4}},
    "source": {"backbone": "zoo/mnist_cnn", "image_size": 8, "pretrained": False,
               "transfer": {"method": "finetune", "epochs": 1}},
    "target": {"backbone": "zoo/mnist_cnn", "image_size": 8,
               "transfer": {"method": "finetune", "epochs": 1}},
    "fuse": {"strategy": "auto", "trials": 2, "strategies": ["mean", "weighted"]},
}


def test_a_recipe_can_choose(tmp_path: Path) -> None:
    done = zoo.run(RECIPE, tmp_path / "run")
    stage = done.report["stages"]["fused"]
    assert any("has the best score" in note for note in stage["notes"])


def test_a_recipe_is_told_what_is_wrong_before_any_work(tmp_path: Path) -> None:
    for change, message in (
        ({"trials": 0}, "fuse.trials: zoo/auto: trials is 0"),
        ({"transfer": {"method": "linear_probe"}}, "fuse.transfer: zoo/auto trains what it"),
        ({"strategies": ["wieghted"]}, "fuse.strategies: .*did you mean 'weighted'"),
    ):
        with pytest.raises(RecipeError, match=message):
            zoo.run({**RECIPE, "fuse": {**RECIPE["fuse"], **change}}, tmp_path / "run")
