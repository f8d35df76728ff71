"""The features on the disk: found again by other processes, never wrong, never a reason to fail."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import zoo
from zoo import features
from zoo.backbones import Preprocessing
from zoo.cache.kept import kept_files, kept_folder
from zoo.cli import main
from zoo.datasets import ImageData, load_data
from zoo.errors import OptionError, ZooError
from zoo.evaluation import member_logits, predict
from zoo.features import extract, forget, take, trunk_features
from zoo.model import Model
from zoo.tensors.kept import keep, kept

CLASSES = ("a", "b", "c")
# As `on_disk` does here, in a process of its own.
CHILD = """
    import math, os, signal, sys, torch, zoo
    from zoo import features
    from zoo.datasets import ImageData
    features.DISK_LEAST_BYTES = features.DISK_LEAST_SECONDS = 0
    features.DISK_BYTES_PER_SECOND = math.inf
    model = zoo.backbone("mnist_cnn", classes=("a", "b", "c"), image_size=8, device="cpu", seed=0)
    pixels = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = ImageData(pixels, [i % 3 for i in range(10)], ("a", "b", "c"))
"""


@pytest.fixture(autouse=True)
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All features go to a folder of this test's own, however small they are."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "DISK_LEAST_BYTES", 0)
    monkeypatch.setattr(features, "DISK_LEAST_SECONDS", 0)
    monkeypatch.setattr(features, "DISK_BYTES_PER_SECOND", math.inf)
    forget()


def net(seed: int = 0, **options: object) -> Model:
    return zoo.backbone("mnist_cnn", classes=CLASSES, image_size=8, device="cpu", seed=seed,
                        **options)  # type: ignore[arg-type]


def images(n: int = 10, seed: int = 0, side: int = 8) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    return ImageData(torch.rand(n, 3, side, side, generator=generator),
                     [i % 3 for i in range(n)], CLASSES)


def anew(model: Model, data: ImageData) -> Tensor:
    """Features as a new process would have them."""
    forget()
    return trunk_features(model, data)[0]


def child(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD) + textwrap.dedent(code)], text=True,
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate()
    return process.returncode, printed


def test_they_are_found_again_bit_for_bit(runs: list[int]) -> None:
    model, data = net(), images(200)
    fresh = anew(model, data).clone()
    assert torch.equal(anew(model, data), fresh)
    assert torch.equal(anew(model, data.without_labels()), fresh)
    assert len(runs) == 1
    with torch.no_grad():
        assert torch.equal(extract(model, data, model.trunk)[0], fresh)
    (only,) = kept_files()
    assert (only.about["model"], only.about["images"]) == ("zoo/mnist_cnn", "200")


def test_another_process_finds_them() -> None:
    here = anew(net(), images())
    (only,) = kept_files()
    os.utime(only.file, (1, 1))
    code, printed = finished(child("""
        features.extract = None    # whoever computes, fails
        print(float(features.trunk_features(model, data)[0].double().sum()))
    """))
    assert code == 0, printed
    assert float(printed) == float(here.double().sum())
    assert kept_files()[0].used > 1


def test_what_changes_the_features_is_never_served_from_before(runs: list[int]) -> None:
    model, data = net(), images(side=12)  # so that the member resizes them
    anew(model, data)

    def other_weights() -> None:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1

    def other_statistics() -> None:  # so little that a look at some images would not tell
        member = next(model.each_member())
        assert member.preprocessing is not None
        member.preprocessing = Preprocessing(mean=(member.preprocessing.mean[0] + 1e-4,) * 3,
                                             std=member.preprocessing.std, size=(8, 8))
        member._set_statistics()

    def other_resizing() -> None:
        member = next(model.each_member())
        assert member.preprocessing is not None
        member.preprocessing = Preprocessing(mean=(0.1,) * 3, std=(0.2,) * 3, size=(8, 8),
                                             interpolation="bilinear")
        member._set_statistics()

    def other_kind() -> None:
        next(model.each_member()).gives = "tokens"

    changes: list[Callable[[], object]] = [
        other_weights, other_statistics, other_resizing, other_kind,
        lambda: model.set_activation("tanh"), lambda: model.to(torch.bfloat16)]
    for number, change in enumerate(changes, 2):
        change()
        now = anew(model, data)
        assert len(runs) == number, change
        with torch.no_grad():
            assert torch.equal(now, extract(model, data, model.trunk)[0]), change
    anew(model, images(seed=1, side=12))
    anew(model, data.subset([0, 1, 2]))
    assert len(runs) == len(changes) + 3


def test_a_network_whose_code_has_changed_is_noticed(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = net(), images()
    anew(model, data)
    member = next(model.each_member())
    forward = member.net.forward_features
    monkeypatch.setattr(member.net, "forward_features",
                        lambda x: forward(x) * 1.1)  # type: ignore[operator]
    new = anew(model, data)
    assert len(runs) == 2
    with torch.no_grad():
        assert torch.equal(new, extract(model, data, model.trunk)[0])
    assert torch.equal(anew(model, data), new)
    assert len(runs) == 2


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: b"x" * 500,
    lambda data: _flipped(data, len(data) - 5 * 4 * net().dim),  # in a row that nobody compares
    lambda data: data.replace(b"of all images", b"of some image"),
], ids=["cut by a byte", "cut in the header", "empty", "foreign", "one bit", "another tensor"])
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], runs: list[int]) -> None:
    model, data = net(), images()
    fresh = anew(model, data).clone()
    (only,) = kept_files()
    whole = only.file.read_bytes()
    forget()  # the map of the old file
    only.file.write_bytes(damage(whole))
    assert torch.equal(anew(model, data), fresh)
    assert len(runs) == 2
    assert only.file.read_bytes() == whole
    assert torch.equal(anew(model, data), fresh)
    assert len(runs) == 2


def _flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


def test_a_file_that_is_a_folder_is_no_reason_to_fail(runs: list[int]) -> None:
    model, data = net(), images()
    fresh = anew(model, data).clone()
    (only,) = kept_files()
    only.file.unlink()
    only.file.mkdir()
    assert torch.equal(anew(model, data), fresh)
    assert kept_files() == []


def test_those_used_last_stay_within_the_limit(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images()
    anew(net(0), data)
    size = kept_files()[0].size
    monkeypatch.setenv("ZOO_CACHE_LIMIT", str(2 * size + 5000))
    first = kept_files()[0].file
    anew(net(1), data)
    for each in kept_files():
        os.utime(each.file, (1, 2 if each.file == first else 1))
    anew(net(0), data)  # used again, so that net 1 is the oldest
    anew(net(2), data)
    assert len(runs) == 3
    assert len(kept_files()) == 2
    anew(net(0), data)
    assert len(runs) == 3
    anew(net(1), data)
    assert len(runs) == 4
    monkeypatch.setenv("ZOO_CACHE_LIMIT", str(size // 2))
    anew(net(3), data)
    assert len(kept_files()) == 2, "what could not be kept took the place of others"
    monkeypatch.setenv("ZOO_CACHE_LIMIT", "0")
    anew(net(0), data)
    assert len(runs) == 6
    monkeypatch.setenv("ZOO_CACHE_LIMIT", "lots")
    with pytest.raises(OptionError, match="ZOO_CACHE_LIMIT: 'lots' is no size; write 2GB"):
        anew(net(0), data)
    assert len(runs) == 6, "the wrong limit was noticed after the work"


def test_a_map_outlives_its_file(runs: list[int]) -> None:
    model, data = net(), images()
    anew(model, data)
    mapped = anew(model, data)
    held = mapped.clone()
    shutil.rmtree(kept_folder())
    assert torch.equal(mapped, held)
    mapped[:] = 0  # its own pages: the file would not change
    forget()
    assert torch.equal(trunk_features(model, data)[0], held)


def test_changing_what_was_found_leaves_the_file(runs: list[int]) -> None:
    model, data = net(), images()
    fresh = anew(model, data).clone()
    anew(model, data)[:] = 0
    assert torch.equal(anew(model, data), fresh)
    assert len(runs) == 1


@pytest.mark.parametrize("hinder", ["a file in the way", "read-only", "full", "full half way"])
def test_without_a_place_to_write_it_works_all_the_same(
    hinder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[int]
) -> None:
    folder = tmp_path / "cache"
    if hinder == "a file in the way":
        folder.write_text("")
    elif hinder == "read-only":
        (folder / "features").mkdir(parents=True)
        monkeypatch.setattr("zoo.tensors.writing.atomic_file", _refused)  # root may write anywhere
    elif hinder == "full":
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100, 100, 100))
    else:
        monkeypatch.setattr("zoo.atomic._sync", _refused)
    model, data = net(), images()
    first = trunk_features(model, data)[0]
    assert torch.equal(trunk_features(model, data)[0], first)
    assert len(runs) == 1
    assert torch.equal(anew(model, data), first)
    assert len(runs) == 2
    assert not [*folder.glob("features/*"), *folder.glob("features/.*")]


def _refused(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_kill_in_the_middle_of_writing_leaves_nothing_wrong() -> None:
    process = child("""
        def killed(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        zoo.atomic._sync = killed
        features.trunk_features(model, data)
    """.replace("zoo.atomic._sync", "sys.modules['zoo.atomic']._sync"))
    assert finished(process)[0] == -signal.SIGKILL
    assert len(list(kept_folder().glob(".*.tmp"))) == 1
    assert kept_files() == []
    model, data = net(), images()
    anew(net(3), data)
    assert list(kept_folder().glob(".*.tmp")) == [], "whoever writes next, tidies up"
    with torch.no_grad():
        assert torch.equal(anew(model, data), extract(model, data, model.trunk)[0])
    foreign = kept_folder() / ".x.safetensors.other-host.1.00000000.tmp"
    foreign.touch()
    anew(net(1), data)
    assert foreign.exists(), "a process on another host may still be writing it"
    os.utime(foreign, (1, 1))
    anew(net(2), data)
    assert not foreign.exists()


def test_several_processes_at_once() -> None:
    code = """
        from zoo.cache.kept import clear
        reference = features.extract(model, data, model.trunk)[0].detach()
        for turn in range(40):
            features.forget()
            assert torch.equal(features.trunk_features(model, data)[0], reference)
            if turn % int(sys.argv[-1]) == 0:
                clear()
        for file in os.scandir(os.environ["ZOO_CACHE"] + "/features"):
            assert not file.name.endswith(f".{os.getpid()}.tmp")
    """
    running = [child(code.replace("int(sys.argv[-1])", str(each))) for each in (3, 5)]
    for process in running:
        ended, printed = finished(process)
        assert ended == 0, printed


class _Items(Dataset[Tensor]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((3, 8, 8), index / 10)


def test_images_that_are_only_sampled_stay_in_the_process(runs: list[int]) -> None:
    data = load_data(_Items(), labelled=False)
    assert data.sampled
    model = net()
    first = anew(model, data)
    assert torch.equal(trunk_features(model, data)[0], first)
    assert len(runs) == 1
    anew(model, data)
    assert len(runs) == 2
    assert kept_files() == []


def test_what_is_quick_to_compute_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "DISK_LEAST_SECONDS", 60)
    anew(net(), images())
    monkeypatch.setattr(features, "DISK_LEAST_SECONDS", 0)
    monkeypatch.setattr(features, "DISK_LEAST_BYTES", 10**6)
    anew(net(), images())
    monkeypatch.setattr(features, "DISK_LEAST_BYTES", 0)
    monkeypatch.setattr(features, "DISK_BYTES_PER_SECOND", 1e-3)
    anew(net(), images())
    assert kept_files() == []


def test_half_precision_halves_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = net(), images(64)
    whole = anew(model, data).clone()
    size = kept_files()[0].size
    monkeypatch.setenv("ZOO_FEATURES_DTYPE", "float16")
    half = anew(model, data)
    assert half.dtype == torch.float16
    assert torch.equal(anew(model, data), half)
    assert kept_files()[0].size < 0.6 * size
    (rows,) = take((half,), torch.tensor([3, 1]), torch.device("cpu"))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, whole[[3, 1]], rtol=1e-3, atol=1e-3)
    zoo.transfer(model, data, "linear_probe", epochs=1)
    with torch.no_grad():
        next(model.parameters()).mul_(1e8)
    assert anew(model, data).dtype == torch.float32, "float16 cannot hold these"
    monkeypatch.setenv("ZOO_FEATURES_DTYPE", "int8")
    with pytest.raises(OptionError, match="'int8', expected float32, float16, bfloat16"):
        anew(model, data)


# Logits and measures from what is kept


def pair(strategy: str = "mean") -> Model:
    other = zoo.backbone("mnist_cnn", classes=CLASSES[::-1], image_size=8, device="cpu", seed=1)
    return zoo.fuse([net(0), other], strategy)


def unsplit() -> Model:
    model = net()
    next(model.each_member()).splits = False
    return model


@pytest.mark.parametrize("build", [
    net, pair, unsplit, lambda: pair("concat"), lambda: pair("attention"),
    lambda: zoo.fuse([unsplit(), net(1)], "mean"),
    lambda: zoo.fuse([pair("concat"), net(2)], "mean")])
def test_a_prediction_from_what_is_kept_is_the_models(
    build: Callable[[], Model], runs: list[int]
) -> None:
    model, data = build(), images(100)
    model.train()
    plain = predict(model, data, keep=False)
    assert len(runs) == 0
    for _ in range(2):
        forget()
        torch.testing.assert_close(predict(model, data), plain, rtol=1e-5, atol=1e-5)
    assert model.training
    assert len(runs) == 1
    zoo.evaluate(model, data.with_classes(model.classes))
    assert len(runs) == 1, "evaluation shares them"


def test_what_an_evaluation_kept_can_be_trained_from(runs: list[int]) -> None:
    model, data = net(), images(100)
    with torch.inference_mode():
        zoo.evaluate(model, data)
    zoo.transfer(model, data, "linear_probe", epochs=1)
    assert len(runs) == 1


@pytest.mark.parametrize("build", [
    net, unsplit, pair, lambda: zoo.fuse([unsplit(), net(1)], "mean")])
def test_member_logits_are_each_members_own(build: Callable[[], Model], runs: list[int]) -> None:
    model, data = build(), images(100)
    with torch.no_grad(), features.evaluating(model):
        expected = torch.stack(model.answers(data.batch(range(100))[0]))
    for _ in range(2):
        forget()
        torch.testing.assert_close(member_logits(model, data), expected, rtol=1e-5, atol=1e-5)
    assert len(runs) == 1


def test_features_of_a_fusion_are_no_logits() -> None:
    with pytest.raises(ZooError, match="give features and have no logits of their own"):
        member_logits(pair("concat"), images())


def test_logits_follow_the_classifier(runs: list[int]) -> None:
    model, data = unsplit(), images()
    before = member_logits(model, data)
    with torch.no_grad():
        next(model.head_parameters()).add_(1)
    assert not torch.equal(member_logits(model, data), before)
    assert len(runs) == 2


def test_what_there_is_no_memory_for_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "KEEP_BYTES", 0)
    predict(net(), images())
    assert kept_files() == []


def test_a_fusion_of_outputs_is_fitted_on_what_is_kept(runs: list[int]) -> None:
    members, data = [net(0), net(1)], images(60)
    for member in members:
        zoo.evaluate(member, data)
    assert len(runs) == 2
    zoo.fuse(members, "weighted", data=data)
    assert len(runs) == 2


# zoo cache


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["cache", *words])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_lists_clears_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    anew(net(0), images())
    anew(net(1), images(20))
    files = kept_files()
    os.utime(files[1].file, (1, time.time() - 9 * 86400))
    assert command() == 0
    printed = capsys.readouterr().out
    assert "zoo/mnist_cnn" in printed
    assert "9 days ago" in printed
    assert "features: 2 kept" in printed
    assert command("ls", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["images"] for entry in told["entries"]] == ["20", "10"]
    assert told["total"] == sum(each.size for each in files)
    assert told["entries"][0]["bytes"] == files[0].size
    assert command("clear", "--older-than", "7d") == 0
    assert [each.file for each in kept_files()] == [files[0].file]
    assert command("limit", "1GB") == 0
    assert command("limit") == 0
    assert "at most 1.0 GB" in capsys.readouterr().out
    assert command("limit", "1KB") == 0
    assert kept_files() == [], "a smaller limit holds at once"
    anew(net(0), images())
    assert kept_files() == []
    assert command("limit", "1GB") == 0
    anew(net(0), images())
    assert command("clear") == 0
    assert "deleted 1 file" in capsys.readouterr().out
    assert kept_files() == []


@pytest.mark.parametrize(("words", "said"), [
    (("limit", "some"), "'some' is no size; write 2GB"),
    (("clear", "--older-than", "long"), "'long' is no length of time; write 7d"),
])
def test_a_wrong_size_or_time(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_a_limit_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("")
    assert command("limit", "2GB") == 1
    assert "cannot be written; set ZOO_CACHE_LIMIT" in capsys.readouterr().err


def test_the_command_starts_without_torch() -> None:
    code = ("import sys\nfrom zoo.cli import main\ntry:\n    main(['cache'])\nexcept SystemExit:\n"
            "    pass\nprint([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_foreign_files_in_the_folder_are_left_alone() -> None:
    anew(net(), images())
    (kept_folder() / "notes.txt").write_text("mine")
    (kept_folder() / "odd.safetensors").write_text("not one")
    assert len(kept_files()) == 2
    command("ls")
    command("clear")
    assert (kept_folder() / "notes.txt").exists()


def test_a_tensor_under_a_name() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert kept("x") is None
    assert keep("x", tensor, {})
    found = kept("x")
    assert found is not None
    assert torch.equal(found, tensor)
