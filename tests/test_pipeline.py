from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import yaml

import zoo
from zoo.errors import ZooError
from zoo.pipeline import Run

TINY: dict[str, Any] = {
    "data": {"target": {"train": {"data": "zoo/digits", "limit": 80}, "val": 0.25,
                        "test": {"data": "zoo/digits", "limit": 60}}},
    "source": {"backbone": "zoo/mnist_cnn", "pretrained": False, "image_size": 8,
               "transfer": {"method": "finetune", "epochs": 2, "lr": 0.01}},
    "target": {"backbone": "zoo/mnist_cnn", "from": "source", "image_size": 12,
               "transfer": {"epochs": 2, "lr": 0.01}},
    "fuse": {"strategy": "concat", "transfer": {"method": "linear_probe", "epochs": 2}},
    "update": {"method": "self_distill", "epochs": 1},
}
SAME = {"backbone": "zoo/mnist_cnn", "from": "source", "transfer": {"epochs": 1}}
KEY = "[0-9a-f]" * 16
MEASURES = ("n", "accuracy", "interval", "nll", "ece", "confusion", "parameters", "model")


def changed(**changes: Any) -> dict[str, Any]:
    """The tiny recipe with other values; `__` goes down, None takes a field out."""
    recipe = copy.deepcopy(TINY)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = recipe
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    return recipe


def kept(report: dict[str, Any]) -> list[str]:
    return [name for name, stage in report["stages"].items() if stage["kept"]]


def measures(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {key: stage[key] for key in MEASURES} for name, stage in report["stages"].items()}


def notes(report: dict[str, Any], stage: str) -> str:
    return "; ".join(report["stages"][stage]["notes"])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the tiny recipe; tests go on from it in the same folder."""
    return zoo.run(TINY, tmp_path_factory.mktemp("first"), device="cpu")


def test_a_run_measures_every_stage_on_the_same_test_set(first: Run) -> None:
    stages = first.report["stages"]
    assert list(stages) == ["source", "target", "fused", "updated", "everything"]
    assert {stage["n"] for stage in stages.values()} == {60}
    for stage in stages.values():
        assert stage["interval"][0] <= stage["accuracy"] <= stage["interval"][1]
        assert stage["train_seconds"] > 0
        assert not stage["kept"]
    assert stages["updated"]["parameters"] == stages["target"]["parameters"]
    assert stages["fused"]["model"] == "zoo/concat"
    assert [len(stage["history"]) for stage in stages.values()] == [2, 2, 2, 1, 2]
    assert first.report["data"] == {"train": 60, "val": 20, "test": 60, "source": 0,
                                    "unlabelled": 0, "classes": list("0123456789")}


def test_a_run_leaves_the_report_and_the_fused_model(first: Run) -> None:
    assert json.loads((first.out / "report.json").read_text()) == first.report
    assert (first.out / "report.md").read_text().startswith("# Report\n\nThe fused model (")
    loaded = zoo.load(first.out / "fused", device="cpu")
    images = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(loaded(images), first.model(images))
    measured = zoo.evaluate(loaded, zoo.load_data("zoo/digits", role="test", limit=60))
    assert measured.accuracy == first.report["stages"]["fused"]["accuracy"]
    assert not list(first.out.glob("steps/*.part"))


def test_the_report_and_the_models_card_show_what_was_measured(first: Run) -> None:
    names = {"confusion.png", "calibration.png", "comparison.png"}
    for folder, page in ((first.out, "report.md"), (first.out / "fused", "README.md")):
        assert {file.name for file in folder.glob("*.png")} == names
        assert all(f"]({name})" in (folder / page).read_text() for name in names)
    card = (first.out / "fused" / "README.md").read_text()
    assert "On the same 60 test images of `zoo/digits`." in card
    for stage in ("source", "target", "fused", "updated", "everything"):
        measured = first.report["stages"][stage]
        assert f"| {stage} | {100 * measured['accuracy']:.2f} % |" in card


def test_nothing_is_done_twice(first: Run) -> None:
    again = zoo.run(TINY, first.out, device="cpu")
    assert kept(again.report) == ["source", "target", "fused", "updated", "everything"]
    assert measures(again.report) == measures(first.report)
    assert again.report["tests"] == first.report["tests"]
    assert [stage["train_seconds"] for stage in again.report["stages"].values()] == [
        stage["train_seconds"] for stage in first.report["stages"].values()]


@pytest.mark.parametrize(("change", "still_kept"), [
    ({"update__epochs": 2}, ["source", "target", "fused", "everything"]),
    ({"update": None}, ["source", "target", "fused", "everything"]),
    ({"fuse__norm": False}, ["source", "target", "everything"]),
    ({"target__transfer__lr": 0.02}, ["source"]),
    ({"source__transfer__lr": 0.02}, ["everything"]),
    ({"everything": {"transfer": {"epochs": 1}}}, ["source", "target", "fused", "updated"]),
    ({"evaluate": {"attacks": {"fgsm": {"eps": 0.1}}}},
     ["source", "target", "fused", "updated", "everything"]),
    ({"data__target__test__limit": 50}, ["source", "target", "fused", "updated", "everything"]),
    ({"data__target__train__limit": 90}, []),
    ({"data__target__val": 0.5}, []),
    ({"seed": 1}, []),
])
def test_a_run_goes_on_from_the_first_step_that_changed(
    first: Run, change: dict[str, Any], still_kept: list[str]
) -> None:
    report = zoo.run(changed(**change), first.out, device="cpu").report
    assert kept(report) == still_kept
    assert ("updated" in report["stages"]) == (change.get("update", 0) is not None)


def test_a_new_version_makes_every_step_anew(
    first: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "__version__", "99")
    assert kept(zoo.run(TINY, first.out, device="cpu").report) == []


def test_a_fusion_may_be_a_member_of_the_next(tmp_path: Path) -> None:
    """Each is a step of its own, and gives what fusing by hand gives."""
    inner = {"strategy": "wise_ft", "members": ["target"], "base": "source", "alpha": 0.25}
    recipe = changed(target=SAME, update=None, fuse={
        "strategy": "average", "weight": [1, 3], "members": ["source", inner]})
    made = zoo.run(recipe, tmp_path / "run", device="cpu")
    source, target, moved = (
        zoo.load(next(tmp_path.glob(f"run/steps/{name}-{KEY}")), device="cpu")
        for name in ("source", "target", "fused-2"))
    by_hand = zoo.fuse([target], "wise_ft", base=source, alpha=0.25)
    whole = zoo.fuse([source, by_hand], "average", weight=[1, 3])
    for found, wanted in ((moved, by_hand), (made.model, whole)):
        for key, tensor in wanted.state_dict().items():
            torch.testing.assert_close(found.state_dict()[key], tensor)
    sources = made.model.recipe["sources"]
    assert sources[1]["recipe"]["strategy"] == "zoo/wise_ft"
    begun = {each.name for each in tmp_path.glob("run/steps/fused-*")}
    recipe["fuse"]["weight"] = [1, 1]
    again = zoo.run(recipe, tmp_path / "run", device="cpu")
    assert kept(again.report) == ["source", "target", "everything"]
    new = {each.name for each in tmp_path.glob("run/steps/fused-*")} - begun
    assert not [name for name in new if name.startswith("fused-2")]  # it was kept


def test_other_models_may_be_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    other = zoo.backbone("zoo/mnist_cnn", num_classes=10, image_size=16, seed=3, device="cpu")
    zoo.save(other, "other")
    recipe = changed(fuse={"strategy": "mean", "members": ["source", "target", "./other"]},
                     update=None)
    made = zoo.run(recipe, "run", device="cpu")
    assert len(made.model.members) == 3
    assert made.model.image_size == 16
    zoo.save(zoo.backbone("zoo/mnist_cnn", num_classes=10, seed=4, device="cpu"), "other")
    assert "fused" not in kept(zoo.run(recipe, "run", device="cpu").report)


PLUGIN = """
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="mine", build="zoo.fusion.outputs.mean:Mean", kind="outputs")]
"""


def test_a_new_version_of_a_plugin_makes_its_step_anew(
    tmp_path: Path, install: Callable[..., Path]
) -> None:
    site = install("acme", PLUGIN).parent
    recipe = changed(fuse={"strategy": "acme/mine"}, update=None)
    zoo.run(recipe, tmp_path / "out", device="cpu")
    assert len(kept(zoo.run(recipe, tmp_path / "out", device="cpu").report)) == 4
    for file in site.glob("*.dist-info/*"):
        file.unlink()
    next(site.glob("*.dist-info")).rmdir()
    install("acme", PLUGIN, version="2.0")
    assert kept(zoo.run(recipe, tmp_path / "out", device="cpu").report) == [
        "source", "target", "everything"]


def test_half_a_step_and_a_damaged_one_do_not_count(tmp_path: Path) -> None:
    recipe = changed(update=None)
    whole = zoo.run(recipe, tmp_path, device="cpu").report
    next(tmp_path.glob(f"steps/source-{KEY}.json")).unlink()
    next(tmp_path.glob("steps/target-*/model.safetensors")).write_bytes(b"half")
    again = zoo.run(recipe, tmp_path, device="cpu").report
    assert kept(again) == ["fused", "everything"]
    assert measures(again) == measures(whole)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a kill is POSIX's")
def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path: Path) -> None:
    recipe = changed(target__transfer={"method": "finetune", "epochs": 12, "lr": 0.01},
                     everything={"transfer": {"epochs": 1}}, update=None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    code = "import zoo; zoo.run('recipe.yaml', 'killed', device='cpu')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        checkpoint = _wait_for(tmp_path, "killed/steps/target-*.part/1/transfer.ckpt", child)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    source = next(tmp_path.glob("killed/steps/source-*/model.safetensors"))
    written = source.stat().st_mtime_ns
    begun = torch.load(checkpoint, weights_only=True)["history"]
    assert 0 < len(begun) < 12

    resumed = zoo.run(tmp_path / "recipe.yaml", tmp_path / "killed", device="cpu").report
    assert kept(resumed) == ["source"]
    assert source.stat().st_mtime_ns == written
    history = resumed["stages"]["target"]["history"]
    assert len(history) == 12
    assert history[:len(begun)] == begun
    whole = zoo.run(tmp_path / "recipe.yaml", tmp_path / "whole", device="cpu").report
    assert measures(resumed) == measures(whole)
    assert resumed["tests"] == whole["tests"]


def _wait_for(folder: Path, pattern: str, child: subprocess.Popen[bytes]) -> Path:
    while child.poll() is None:
        found = next(folder.glob(pattern), None)
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError("the run ended before it could be killed")


def test_two_runs_cannot_work_in_one_folder(first: Run) -> None:
    with (filelock.FileLock(first.out / "steps" / ".lock"),
          pytest.raises(ZooError, match=r"another run is working in .*choose another folder")):
        zoo.run(TINY, first.out, device="cpu")


@pytest.mark.parametrize(("fuse", "extra"), [
    ({"strategy": "average", "weight": [0.25, 0.75]}, 0),
    ({"strategy": "ties", "density": 0.5}, 0),
    ({"strategy": "wise_ft"}, 0),
    ({"strategy": "wise_ft", "search": {"alpha": "0..1"}}, 0),
    ({"strategy": "greedy_soup"}, 0),
    ({"strategy": "mean"}, 1),
    ({"strategy": "weighted"}, 1),
    ({"strategy": "gated"}, 2),
])
def test_every_kind_of_fusion(tmp_path: Path, fuse: dict[str, Any], extra: int) -> None:
    recipe = changed(target=SAME, source__image_size=None, fuse=fuse, update=None,
                     source__transfer={"method": "finetune", "epochs": 1})
    report = zoo.run(recipe, tmp_path, device="cpu").report
    assert "it starts from the source's weights" in notes(report, "target")
    size, fused = (report["stages"][name]["parameters"] for name in ("target", "fused"))
    if extra == 0:
        assert fused == size
        described = json.loads((tmp_path / "fused" / "config.json").read_text())
        sources = described["zoo"]["made_with"]["sources"]
        assert len(sources) == (1 if fuse["strategy"] == "wise_ft" else 2)
    else:
        assert fused >= 1.9 * size
    assert len(report["stages"]["fused"]["history"]) == (10 if extra == 2 else 0)


def test_source_data_of_the_same_classes_join_the_baseline(tmp_path: Path) -> None:
    recipe = changed(update=None)
    recipe["data"]["source"] = {"train": {"data": "zoo/digits", "limit": 70, "seed": 5}}
    run = zoo.run(recipe, tmp_path, device="cpu")
    assert run.report["data"]["source"] == 70
    assert notes(run.report, "everything") == ""
    everything = zoo.load(next(tmp_path.glob(f"steps/everything-{KEY}")), device="cpu")
    assert everything.recipe["transfers"][0]["images"] == 150
    assert "val_accuracy" not in run.report["stages"]["source"]["history"][0]


def test_source_data_of_other_classes(tmp_path: Path) -> None:
    from PIL import Image

    for name, colour in (("dark", 10), ("light", 240)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 16), (colour + number,) * 3).save(
                tmp_path / "photos" / name / f"{number}.png")
    recipe = changed(update=None)
    recipe["data"]["source"] = {"train": "photos"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = zoo.run(tmp_path / "recipe.yaml", tmp_path / "out", device="cpu").report
    assert "its classes are not the target's" in notes(report, "source")
    assert len(report["stages"]["source"]["history"]) == 12
    assert "of other classes" in notes(report, "everything")


def test_unlabelled_images_reach_the_method_that_uses_them(tmp_path: Path) -> None:
    recipe = changed(target__transfer={"method": "dann", "epochs": 1}, update=None)
    recipe["data"]["target"]["unlabelled"] = {"data": "zoo/digits", "limit": 40, "seed": 3}
    report = zoo.run(recipe, tmp_path, device="cpu").report
    assert report["data"]["unlabelled"] == 40
    assert "dann does not learn from teachers; it had none" in notes(report, "target")


def test_attacks_are_measured_for_every_stage(tmp_path: Path) -> None:
    recipe = changed(evaluate={"attacks": {"pgd": {"eps": 0.1, "steps": 2}}}, update=None)
    report = zoo.run(recipe, tmp_path, device="cpu").report
    for stage in report["stages"].values():
        assert stage["attacks"]["pgd"]["accuracy"] == stage["robust"] <= stage["accuracy"]
    assert "## Under attack" in (tmp_path / "report.md").read_text()


def test_a_saved_model_beside_the_recipe_can_be_the_source(
    tmp_path: Path, first: Run
) -> None:
    model = zoo.backbone("zoo/mnist_cnn", num_classes=10, image_size=8, device="cpu", seed=3)
    zoo.save(model, tmp_path / "mine")
    recipe = changed(source={"backbone": "./mine", "transfer": {"epochs": 1}}, update=None)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    zoo.run(tmp_path / "recipe.yaml", tmp_path / "out", device="cpu")
    assert "source" in kept(zoo.run(tmp_path / "recipe.yaml", tmp_path / "out").report)
    zoo.save(zoo.backbone("zoo/mnist_cnn", num_classes=10, image_size=8, device="cpu", seed=4),
             tmp_path / "mine")
    assert "source" not in kept(zoo.run(tmp_path / "recipe.yaml", tmp_path / "out").report)


def test_a_log_gets_a_line_or_two_per_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZOO_PROGRESS", "1")
    monkeypatch.setattr("zoo.progress._SILENCE", 1e9)
    zoo.run(changed(update=None), tmp_path, device="cpu")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "source", "source", "target", "target", "fused", "fused", "everything", "everything",
        "run"]
    assert lines[0] == "source: zoo/mnist_cnn, finetune"
    assert " % of 60 test images right, after " in lines[1]
