"""A choice of `auto` is made again, and what can be compared of its ranking is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.datasets import ImageData
from zoo.errors import ProvenanceError

CLASSES = 4


def images(count: int, seed: int) -> ImageData:
    """Bright bars whose place is the class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = 0.5 * torch.rand(count, 1, 8, 8, generator=generator)
    for place, label in enumerate(labels.tolist()):
        pixels[place, :, 2 * label:2 * label + 2] += 0.15
    return ImageData(pixels.clamp(0, 1), labels)


def net(seed: int) -> zoo.Model:
    return zoo.backbone("zoo/mnist_cnn", num_classes=CLASSES, image_size=8, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks that are right about half of the time, and one that knows nothing."""
    place = tmp_path_factory.mktemp("members")
    found = []
    for seed in (0, 1, 2):
        model = net(seed)
        if seed < 2:
            zoo.transfer(model, images(60, 10 + seed), "finetune", epochs=4, seed=seed)
        found.append(zoo.save(model, place / str(seed)))
    return found


@pytest.fixture(scope="module")
def data() -> ImageData:
    return images(60, 0)


def given(folders: list[Path], prefix: str = "") -> dict[str, Path]:
    return {f"{prefix}{number}": folder for number, folder in enumerate(folders, 1)}


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["zoo"]["made_with"]["auto"])
    file.write_text(json.dumps(config))


@pytest.fixture
def chosen(folders: list[Path], data: ImageData, tmp_path: Path) -> Path:
    model = zoo.fuse(folders[:2], "auto", data=data, trials=3, head_epochs=4, device="cpu",
                     strategies=["mean", "weighted", "concat"])
    assert model.fusion is not None
    assert "sources" not in model.recipe["auto"]  # the recipe of the fusion has them
    return zoo.save(model, tmp_path / "chosen")


def test_a_choice_by_trials_comes_out_the_same(
    chosen: Path, folders: list[Path], data: ImageData
) -> None:
    sources = given(folders[:2])
    done = zoo.reproduce(chosen, sources=sources, data=data)
    assert done.choice is None
    assert "the choice is not: choice=True (--choice), with data, does that too" in done.notes[0]
    done = zoo.reproduce(chosen, sources=sources, data=data, choice=True)
    assert done.reproduced, done
    assert not done.notes
    assert done.choice is not None
    assert done.choice.then == done.choice.now
    assert (done.choice.compared, done.choice.same) == (5, True)
    # Images of other values: the ranking is another one.
    done = zoo.reproduce(chosen, sources=sources, data=images(60, 4), choice=True)
    assert not done.reproduced
    assert done.choice is not None
    assert done.choice.differing
    assert any("the data for auto may not be the same" in note for note in done.notes)


@pytest.mark.parametrize(("change", "said"), [
    (lambda auto: auto["ranking"][1].update(accuracy=0.999), "right of 60 images then and"),
    (lambda auto: auto["ranking"][1].update(nll=9.0), "had an NLL of 9 then and"),
    (lambda auto: auto["ranking"][1].update(images=59), "was tried on 59 images in "),
    (lambda auto: auto["ranking"][1].update(epochs=3), "was tried on 60 images in 3 epochs then"),
    (lambda auto: auto["ranking"][1].update(error="no room"), "failed then only: no room"),
    (lambda auto: auto.update(chosen="zoo/vote"), ""),
    (lambda auto: auto["ranking"].pop(1), ""),
])
def test_a_ranking_that_is_not_true(
    chosen: Path, folders: list[Path], data: ImageData, change: Callable[[Any], None], said: str
) -> None:
    rewrite(chosen, change)
    done = zoo.reproduce(chosen, sources=given(folders[:2]), data=data, choice=True)
    assert done.choice is not None
    assert not done.choice.same
    assert not done.reproduced
    assert not done.differing  # of the tensors none does
    assert said in " ".join(done.choice.differing)


def test_with_seconds_only_what_was_tried_alike_is_compared(
    folders: list[Path], data: ImageData, tmp_path: Path
) -> None:
    model = zoo.fuse(folders[:2], "auto", data=data, budget=0.4, head_epochs=4, device="cpu",
                     strategies=["mean", "weighted"])
    out = zoo.save(model, tmp_path / "chosen")
    rewrite(out, lambda auto: auto.update(chosen="zoo/vote"))
    rewrite(out, lambda auto: auto["ranking"].remove(next(
        row for row in auto["ranking"] if row["kind"] == "outputs")))
    rewrite(out, lambda auto: next(row for row in auto["ranking"] if row["name"].startswith(
        "member 2")).update(epochs=1, accuracy=0.999))
    done = zoo.reproduce(out, sources=given(folders[:2]), data=data, choice=True)
    assert done.reproduced, done
    assert done.choice is not None
    assert done.choice.uncertain[0] == ("it had 0.4 seconds, and how many candidates are tried in "
                                        "them depends on the machine")
    assert done.choice.then == "zoo/vote"
    assert done.choice.compared >= 1
    rewrite(out, lambda auto: next(row for row in auto["ranking"] if row["name"].startswith(
        "member 1")).update(accuracy=0.999))
    done = zoo.reproduce(out, sources=given(folders[:2]), data=data, choice=True)
    assert done.choice is not None
    assert not done.choice.same


def test_another_set_of_strategies_is_said(
    chosen: Path, folders: list[Path], data: ImageData
) -> None:
    def all_of_them(auto: Any) -> None:
        auto["asked"]["strategies"] = None
        auto.update(trials=1, budget=None)
        auto["not_tried"]["acme/gone"] = "the trials ended before its turn"

    rewrite(chosen, all_of_them)
    done = zoo.reproduce(chosen, sources=given(folders[:2]), data=data, choice=True)
    assert done.choice is not None
    assert "all strategies were asked for, and these are not there both times: acme/gone" in (
        done.choice.uncertain[0])


def test_a_member_that_was_better_alone(
    folders: list[Path], data: ImageData, tmp_path: Path
) -> None:
    """All members are recorded then, and the images of the choice are not those of its training."""
    model = zoo.fuse([folders[0], folders[2]], "auto", data=data, trials=1, device="cpu",
                     strategies=["vote"])
    assert model.fusion is None
    out = zoo.save(model, tmp_path / "alone")
    sources = given([folders[0], folders[2]], "member")
    done = zoo.reproduce(out, sources=sources, data=data, choice=True)
    assert done.reproduced, done
    assert done.tolerance == 0.0
    assert "auto chose its member 1 as it was" in done.notes[0]
    with pytest.raises(ProvenanceError, match=r"its member 1 .* was trained by zoo/finetune before "
                                              r"it was fused.* --source member1=PATH"):
        zoo.reproduce(out, sources={"member2": folders[2]}, data=data, choice=True)


def test_what_cannot_be_chosen_again(
    chosen: Path, folders: list[Path], data: ImageData, tmp_path: Path
) -> None:
    sources = given(folders[:2])
    with pytest.raises(ProvenanceError, match="auto chose on images; pass the same: --data"):
        zoo.reproduce(chosen, sources=sources, choice=True)
    rewrite(chosen, lambda auto: auto.pop("asked"))
    with pytest.raises(ProvenanceError, match="the choice cannot be made again: what was asked of"):
        zoo.reproduce(chosen, sources=sources, data=data, choice=True)
    assert "the choice is not: what was asked of it beside trials" in zoo.reproduce(
        chosen, sources=sources, data=data).notes[0]
    plain = zoo.save(zoo.fuse(folders[:2], "mean", device="cpu"), tmp_path / "plain")
    with pytest.raises(ProvenanceError, match="auto did not choose it; leave choice out"):
        zoo.reproduce(plain, sources=sources, data=data, choice=True)


def test_from_the_command_line(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "bars.csv"
    pixels, labels = images(40, 0).batch(range(40))
    rows = [[label, *(image.flatten() * 255).int().tolist()]
            for image, label in zip(pixels, labels.tolist(), strict=True)]
    header = ["label", *(f"pixel{number}" for number in range(64))]
    place.write_text("\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    model = zoo.fuse(folders[:2], "auto", data=place, trials=1, device="cpu", strategies=["mean"])
    out = zoo.save(model, tmp_path / "chosen")
    prefix = "member" if model.fusion is None else ""
    with pytest.raises(SystemExit) as end:
        main(["reproduce", str(out), "--data", str(place), "--choice",
              *(f"--source={label}={folder}" for label, folder in
                given(folders[:2], prefix).items())])
    told = capsys.readouterr().out
    assert not end.value.code, told
    assert "auto's choice: the same; 3 candidates compared, 0 differ" in told
