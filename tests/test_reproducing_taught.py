"""What was trained with teachers, on unlabelled images or with a validation set is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub

import zoo
from zoo.cli import main
from zoo.datasets import ImageData, load_data
from zoo.errors import ProvenanceError

pytestmark = pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", role="train").take(60)


@pytest.fixture(scope="module")
def others() -> ImageData:
    return load_data("digits", role="test").take(40)


def net(seed: int, digits: ImageData) -> zoo.Model:
    torch.manual_seed(seed)  # a seed of its own would say how to make it again
    return zoo.backbone("mnist_cnn", classes=digits.classes, device="cpu")


@pytest.fixture
def folders(digits: ImageData, tmp_path: Path) -> dict[str, Path]:
    """A student and two teachers."""
    return {name: zoo.save(net(seed, digits), tmp_path / name)
            for seed, name in enumerate(("student", "one", "two"))}


@pytest.fixture
def published(hub: Hub, folders: dict[str, Path]) -> dict[str, zoo.Model]:
    for name, folder in folders.items():
        hub.store.seed(f"org/{name}", folder)
    return {name: zoo.load(f"hf-hub:org/{name}", device="cpu") for name in folders}


def refused(folder: Path, **given: Any) -> str:
    with pytest.raises(ProvenanceError) as caught:
        zoo.reproduce(folder, **given)
    return str(caught.value)


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["zoo"]["made_with"]["transfers"][-1].update(changes)
    file.write_text(json.dumps(config))


class TestTeachersOnTheHub:
    @pytest.mark.parametrize(("method", "options"), [
        ("distill", {"weights": "confidence"}), ("feature_distill", {"hidden": 8}),
        ("self_distill", {}),
    ])
    def test_each_is_fetched_at_its_commit(
        self, hub: Hub, published: dict[str, zoo.Model], folders: dict[str, Path],
        digits: ImageData, tmp_path: Path, method: str, options: dict[str, Any],
    ) -> None:
        student = published["student"]
        zoo.transfer(student, digits, method, teachers=[published["one"], published["two"]],
                     epochs=1, seed=3, **options)
        out = zoo.save(student, tmp_path / "taught")
        commits = hub.store.repositories["org/one"].commits
        hub.store.seed("org/one", folders["two"])  # it moves on; its commit stays
        hub.store.repositories["org/one"].commits.update(commits)
        done = zoo.reproduce(out, data=digits)
        assert done.reproduced, done
        assert not done.notes
        # The teachers matter: without the very same ones it comes out otherwise.
        told = json.loads((out / "config.json").read_text())["zoo"]["made_with"]["transfers"][0]
        rewrite(out, teachers=told["teachers"][1:] * 2)
        assert not zoo.reproduce(out, data=digits).reproduced

    def test_a_teacher_that_is_a_fusion_is_made_again(
        self, published: dict[str, zoo.Model], digits: ImageData, tmp_path: Path
    ) -> None:
        student = published["student"]
        for strategy in ("average", "mean", "concat"):
            teacher = zoo.fuse([published["one"], published["two"]], strategy)
            zoo.transfer(student, digits, "distill", teachers=[teacher], epochs=1)
        inner = zoo.fuse([teacher, published["one"]], "mean")  # fused of a fusion
        zoo.transfer(student, digits, "self_distill", teachers=[inner], epochs=1)
        done = zoo.reproduce(zoo.save(student, tmp_path / "taught"), data=digits)
        assert done.reproduced, done

    def test_a_fused_model_that_was_taught(
        self, published: dict[str, zoo.Model], digits: ImageData, tmp_path: Path
    ) -> None:
        fused = zoo.fuse([published["student"], published["one"]], "concat", num_classes=3)
        zoo.transfer(fused, digits, "distill", teachers=[published["two"]], epochs=1)
        out = zoo.save(fused, tmp_path / "taught")
        done = zoo.reproduce(out)
        assert {key.partition(".")[0] for key in done.unchecked} >= {"head"}
        assert done.notes == ("it was trained (zoo/distill on 60 images); pass the same data to "
                              "check what that changed: --data train.csv (data=…)",)
        assert zoo.reproduce(out, data=digits).reproduced


class TestTeachersThatAreGiven:
    @pytest.fixture
    def taught(self, folders: dict[str, Path], digits: ImageData, tmp_path: Path) -> Path:
        student, one, two = (zoo.load(folders[name], device="cpu") for name in folders)
        zoo.transfer(student, digits, "distill", teachers=[one, two], epochs=1)
        zoo.transfer(student, digits, "self_distill", teachers=[one], epochs=1)
        return zoo.save(student, tmp_path / "taught")

    def test_they_are_counted_through_all_transfers(
        self, taught: Path, folders: dict[str, Path], digits: ImageData
    ) -> None:
        given: dict[str, Any] = {"1": folders["student"], "teacher1": folders["one"],
                                 "teacher2": folders["two"]}
        assert "its teacher 3 (zoo/mnist_cnn) says nothing of where its weights are published; " \
            "if you have it, say where: --source teacher3=PATH" in refused(
                taught, sources=given, data=digits)
        done = zoo.reproduce(taught, sources={**given, "teacher3": folders["one"]}, data=digits)
        assert done.reproduced, done
        # Without the data nobody teaches, and what is given all the same is no mistake.
        done = zoo.reproduce(taught, sources={"1": folders["student"]})
        assert done.unchecked
        assert not done.reproduced
        assert zoo.reproduce(taught, sources={
            "1": folders["student"], "teacher1": folders["one"]}).unchecked == done.unchecked

    def test_another_one_is_refused(
        self, taught: Path, folders: dict[str, Path], digits: ImageData, tmp_path: Path
    ) -> None:
        given: dict[str, Any] = {"1": folders["student"], "teacher1": folders["two"]}
        assert "two is not its teacher 1 (zoo/mnist_cnn): it has other weights than those that " \
            "taught" in refused(taught, sources=given, data=digits)
        softer = zoo.backbone(folders["one"], activation="gelu", device="cpu")
        given["teacher1"] = zoo.save(softer, tmp_path / "softer")
        assert "softer is not its teacher 1 (zoo/mnist_cnn): it has the right weights and is " \
            "built otherwise: another image size" in refused(taught, sources=given, data=digits)
        assert "it has no source 'teacher9'; did you mean 'teacher" in refused(
            taught, data=digits, sources={
                "1": folders["student"], "teacher9": folders["one"],
                **{f"teacher{n}": folders[name] for n, name in ((1, "one"), (2, "two"),
                                                                 (3, "one"))}})

    def test_one_that_was_trained_here(
        self, folders: dict[str, Path], digits: ImageData, tmp_path: Path
    ) -> None:
        student, one, _ = (zoo.load(folders[name], device="cpu") for name in folders)
        zoo.transfer(one, digits, "linear_probe", epochs=1)
        zoo.transfer(student, digits, "distill", teachers=[one], epochs=1)
        out = zoo.save(student, tmp_path / "taught")
        given = {"1": folders["student"]}
        assert "its teacher 1 (zoo/mnist_cnn) was trained by zoo/linear_probe before it taught, " \
            "and its weights are not published; if you have it" in refused(
                out, sources=given, data=digits)
        given["teacher1"] = zoo.save(one, tmp_path / "trained")
        assert zoo.reproduce(out, sources=given, data=digits).reproduced

    def test_a_record_without_teachers_says_so(
        self, taught: Path, folders: dict[str, Path], digits: ImageData
    ) -> None:
        rewrite(taught, teachers=["zoo/mnist_cnn"])
        done = zoo.reproduce(taught, sources={"1": folders["student"]}, data=digits)
        assert done.notes == ("zoo/self_distill learned from teachers, which are not published "
                              "with the model",)
        assert done.unchecked

    def test_another_device_is_said(self, taught: Path, folders: dict[str, Path]) -> None:
        rewrite(taught, device="xpu")
        done = zoo.reproduce(taught, sources={"1": folders["student"]})
        assert done.notes[0] == ("it was made on xpu and is made again on cpu, which may round "
                                 "differently")

    def test_a_start_that_is_not_the_same_is_said(
        self, taught: Path, folders: dict[str, Path], digits: ImageData
    ) -> None:
        given = {"1": folders["two"], "teacher1": folders["one"], "teacher2": folders["two"],
                 "teacher3": folders["one"]}
        done = zoo.reproduce(taught, sources=given, data=digits)
        assert not done.reproduced
        assert "its training begins with other weights than then" in done.notes[0]

    def test_what_was_trained_before_it_was_published_is_not_trained_again(
        self, hub: Hub, taught: Path, folders: dict[str, Path], digits: ImageData, tmp_path: Path
    ) -> None:
        hub.store.seed("org/taught", taught)
        model = zoo.load("hf-hub:org/taught", device="cpu")
        zoo.transfer(model, digits, "distill", epochs=1,
                     teachers=[zoo.load(folders["two"], device="cpu")])
        out = zoo.save(model, tmp_path / "more")
        done = zoo.reproduce(out, data=digits, sources={"teacher4": folders["two"]})
        assert done.reproduced, done
        assert done.notes == ("2 of its 3 trainings were before its source was published, and are "
                              "not done again",)


class TestFromRandomWeights:
    def test_a_student_is_made_again_from_its_seed(
        self, folders: dict[str, Path], digits: ImageData, tmp_path: Path
    ) -> None:
        with pytest.raises(SystemExit) as end:
            main(["transfer", "mnist_cnn", "--no-pretrained", "--seed", "5", "--data", "digits",
                  "--with", "distill", "--teacher", str(folders["one"]), "--epochs", "1",
                  "--device", "cpu", "-o", str(tmp_path / "student")])
        assert not end.value.code
        with pytest.raises(SystemExit) as end:
            main(["reproduce", str(tmp_path / "student"), "--data", "digits",
                  f"--source=teacher1={folders['one']}"])
        assert not end.value.code

    def test_members_that_were_never_trained(self, digits: ImageData, tmp_path: Path) -> None:
        models = [zoo.backbone("mnist_cnn", classes=digits.classes, seed=seed, device="cpu")
                  for seed in (1, 2)]
        out = zoo.save(zoo.fuse(models, "average", weight=[0.3, 0.7]), tmp_path / "fused")
        done = zoo.reproduce(out)
        assert done.reproduced, done
        assert done.tolerance == 0.0
        zoo.transfer(models[0], digits, "linear_probe", epochs=1)
        out = zoo.save(zoo.fuse(models, "average"), tmp_path / "trained")
        assert "its source 1 (zoo/mnist_cnn) was trained by zoo/linear_probe" in refused(out)

    def test_of_another_dtype(self, digits: ImageData, tmp_path: Path) -> None:
        model = zoo.backbone("mnist_cnn", classes=digits.classes, seed=1, dtype="bfloat16",
                             device="cpu")
        done = zoo.reproduce(zoo.save(model, tmp_path / "half"))
        assert done.reproduced, done
        model.float()
        out = zoo.save(zoo.fuse([model, model], "average"), tmp_path / "fused")
        assert "its source 1 (zoo/mnist_cnn) comes out with other weights when it is made " \
            "again" in refused(out)

    @pytest.mark.filterwarnings("ignore:.* were resampled to the first member's")
    def test_members_and_base_of_other_image_sizes(self, tmp_path: Path) -> None:
        one, other, base = (zoo.backbone("test_vit", num_classes=3, image_size=size, seed=size,
                                         device="cpu") for size in (32, 48, 64))
        out = zoo.save(zoo.fuse([one, other], "ties", base=base), tmp_path / "fused")
        done = zoo.reproduce(out)
        assert done.reproduced, done


class TestImages:
    @pytest.fixture
    def adapted(
        self, folders: dict[str, Path], digits: ImageData, others: ImageData, tmp_path: Path
    ) -> Path:
        student = zoo.load(folders["student"], device="cpu")
        zoo.transfer(student, digits, "dann", unlabelled=others, epochs=2, batch_size=16, hidden=8)
        return zoo.save(student, tmp_path / "adapted")

    def test_unlabelled_images(
        self, adapted: Path, folders: dict[str, Path], digits: ImageData, others: ImageData
    ) -> None:
        given: dict[str, Any] = {"sources": {"1": folders["student"]}, "data": digits}
        done = zoo.reproduce(adapted, **given)
        assert done.notes == (
            "it was trained (zoo/dann on 60 images and 40 unlabelled ones); pass the same data to "
            "check what that changed: --unlabelled photos (unlabelled=…)",)
        assert done.unchecked
        done = zoo.reproduce(adapted, **given, unlabelled=others)
        assert done.reproduced, done
        assert not done.notes
        done = zoo.reproduce(adapted, **given, unlabelled=others.take(30))
        assert done.differing
        assert "the data for unlabelled may not be the same" in done.notes[0]
        assert "no training of it chose its best epoch on other images; leave val out" in refused(
            adapted, **given, val=others)

    def test_a_validation_set(
        self, folders: dict[str, Path], digits: ImageData, others: ImageData, tmp_path: Path
    ) -> None:
        student = zoo.load(folders["student"], device="cpu")
        zoo.transfer(student, digits, "finetune", val=others, epochs=2)
        out = zoo.save(student, tmp_path / "tuned")
        given: dict[str, Any] = {"sources": {"1": folders["student"]}, "data": digits}
        assert "check what that changed: --val val.csv (val=…)" in zoo.reproduce(
            out, **given).notes[0]
        done = zoo.reproduce(out, **given, val=others)
        assert done.reproduced, done
        assert "no training of it adapted to unlabelled images; leave unlabelled out" in refused(
            out, **given, unlabelled=others)

    def test_from_the_command_line(
        self, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train, target = (load_data("digits", role=role, limit=30) for role in ("train", "test"))
        student = zoo.load(folders["student"], device="cpu")
        zoo.transfer(student, train, "dann", unlabelled=target, val=target, epochs=1, hidden=8)
        out = zoo.save(student, tmp_path / "adapted")
        with pytest.raises(SystemExit) as end:
            main(["reproduce", str(out), "--source", f"1={folders['student']}",
                  "--data", "digits", "--val", "digits", "--unlabelled", "digits"])
        told = capsys.readouterr()
        assert end.value.code == 1
        assert "the data for unlabelled may not be the same" in told.err


def test_taking_turns_as_student_and_teacher_does_not_swell(digits: ImageData) -> None:
    """Each recipe would hold the other's, and both be twice as long after every turn."""
    few = digits.take(12)
    one, other = net(1, digits), net(2, digits)
    for _ in range(6):
        zoo.transfer(one, few, "self_distill", teachers=[other], epochs=1)
        zoo.transfer(other, few, "self_distill", teachers=[one], epochs=1)
    told = one.recipe["transfers"]
    assert "recipe" in told[1]["teachers"][0]
    assert "recipe" not in told[-1]["teachers"][0]
    assert told[-1]["teachers"][0]["state_sha256"]
    assert len(json.dumps(told)) < 1_000_000
