"""Values that are best on held-out images: the search itself, and `zoo.fuse(…, search=…)`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.datasets import ImageData
from zoo.errors import FusionError, OptionError
from zoo.model import Model
from zoo.search import Range, best, read_space


def test_lists_and_ranges_are_read() -> None:
    space = read_space("ties", {"density": [0.1, 0.5], "scale": "0.3..1.5", "top": (-1, 2),
                                "steps": "1..9", "far": "1e-3...5"}, whole=["steps"])
    assert space == {"density": (0.1, 0.5), "scale": Range(0.3, 1.5), "top": Range(-1, 2),
                     "steps": Range(1, 9, whole=True), "far": Range(0.001, 0.5)}
    assert str(space["scale"]) == "0.3..1.5"


@pytest.mark.parametrize("given", [[], "0.3", "1.5..0.3", "1..1", (1, 2, 3), "a..b", 0.3, "0..inf"])
def test_what_is_no_list_and_no_range_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match=r"ties: search tries .* for 'scale', expected a list"):
        read_space("ties", {"scale": given})
    with pytest.raises(OptionError, match="expected what to try by option"):
        read_space("ties", {})


def test_lists_are_tried_in_every_combination() -> None:
    seen: list[tuple[Any, Any]] = []

    def evaluate(values: Mapping[str, Any]) -> float:
        seen.append((values["a"], values["b"]))
        return {"x": 1.0, "y": 3.0}[values["b"]] * values["a"]

    top, tried = best({"a": (1, 2), "b": ("x", "y")}, evaluate)
    assert seen == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert dict(top.values) == {"a": 2, "b": "y"}
    assert [each.score for each in tried] == [1, 3, 2, 6]


@pytest.mark.parametrize("peak", [0.3, 0.317, 0.9, 1.5])
def test_ranges_are_looked_at_ever_closer(peak: float) -> None:
    top, tried = best({"scale": Range(0.3, 1.5)}, lambda values: -abs(values["scale"] - peak))
    assert abs(top.values["scale"] - peak) <= 1.2 / 64
    assert len(tried) <= 11
    assert len({each.values["scale"] for each in tried}) == len(tried)
    assert all(0.3 <= each.values["scale"] <= 1.5 for each in tried)


def test_a_range_beside_a_list_and_another_range() -> None:
    def score(values: Mapping[str, Any]) -> tuple[float, float]:
        far = abs(values["p"] - 0.2) + abs(values["q"] - 7.3)
        return (1.0 if values["kind"] == "b" else 0.0), -far

    space = {"kind": ("a", "b"), "p": Range(0, 1), "q": Range(0, 10)}
    top, tried = best(space, score)
    assert top.values["kind"] == "b"
    assert top.values["p"] == pytest.approx(0.2, abs=0.05)
    assert top.values["q"] == pytest.approx(7.3, abs=0.5)
    assert len(tried) <= 2 * 25 + 3 * 4


def test_whole_numbers_stay_whole_and_the_first_of_equals_wins() -> None:
    top, tried = best({"steps": Range(1, 4, whole=True)}, lambda values: 1.0)
    assert [each.values["steps"] for each in tried] == [1, 2, 3, 4]
    assert all(isinstance(each.values["steps"], int) for each in tried)
    assert top.values["steps"] == 1


@cache
def images() -> ImageData:
    """Squares that are brighter in one corner."""
    truth = torch.arange(120) % 4
    pixels = 0.6 * torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for image, corner in enumerate(truth.tolist()):
        top, left = 4 * (corner // 2), 4 * (corner % 2)
        pixels[image, :, top:top + 4, left:left + 4] += 0.3
    return ImageData(pixels, truth)


@cache
def models() -> tuple[Model, Model, Model]:
    """A base and two fine-tunes of it."""
    base = zoo.backbone("zoo/mnist_cnn", num_classes=4, image_size=8, seed=0, device="cpu")
    found = [base]
    for seed in (1, 2):
        model = zoo.fuse([base, base], "average")
        zoo.transfer(model, images(), "finetune", epochs=3, lr=3e-3, seed=seed)
        found.append(model)
    return found[0], found[1], found[2]


def accuracy(model: Model) -> float:
    return zoo.evaluate(model, images()).accuracy


def test_the_best_scale_is_found_and_the_curve_is_kept() -> None:
    base, one, two = models()
    data = images().split(0.5)[1]
    made = zoo.fuse([one, two], "task_arithmetic", base=base, data=data, search={"scale": "0..2"})
    told = made.recipe["search"]
    assert told["space"] == {"scale": "0..2"}
    assert told["images"] == 60  # all: nothing learns from them
    curve = {each["options"]["scale"]: (each["accuracy"], -each["nll"]) for each in told["fusions"]}
    assert {0, 0.5, 1.0, 1.5, 2.0} < set(curve)
    assert told["won"] == "fusion"
    chosen = made.recipe["options"]["scale"]
    assert curve[chosen] == max(curve.values())
    assert zoo.evaluate(made, data).accuracy == curve[chosen][0] > curve[0][0]
    assert made.fusion is not None
    assert made.fusion.options["scale"] == chosen
    same = zoo.fuse([one, two], "task_arithmetic", base=base, scale=chosen)
    batch = images().batch(range(4))[0].expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(made(batch), same(batch))


def test_what_can_look_at_images_does_not_look_at_those_that_judge() -> None:
    _, one, two = models()
    made = zoo.fuse([one, two], "rebasin", data=images(),
                    search={"matching": ["weights", "activations"]})
    assert made.recipe["search"]["images"] == 60


def test_the_result_is_no_worse_than_the_best_member() -> None:
    base, one, two = models()
    made = zoo.fuse([base, one, two], "task_arithmetic", base=base, data=images(),
                    search={"scale": [-3.0, -2.0]})
    told = made.recipe["search"]
    assert told["won"] in ("member 2", "member 3")
    assert [each["member"] for each in told["members"]] == [1, 2, 3]
    best_of = max(told["members"], key=lambda each: (each["accuracy"], -each["nll"]))
    assert told["won"] == f"member {best_of['member']}"
    assert accuracy(made) == best_of["accuracy"] > max(
        each["accuracy"] for each in told["fusions"])
    assert {"scale": -3.0} in [each["options"] for each in told["fusions"]]
    assert made.fusion == (base, one, two)[best_of["member"] - 1].fusion  # not of this search


def test_batch_norm_of_every_candidate_is_settled() -> None:
    one, two = (zoo.backbone("timm/test_resnet", num_classes=4, image_size=32, seed=seed,
                             device="cpu") for seed in (0, 1))
    pixels = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = ImageData(pixels, torch.arange(40) % 4)
    made = zoo.fuse([one, two], "task_arithmetic", base=one, data=data, norms="reestimated",
                    search={"scale": [0.5, 1.0]})
    assert {each["norms"] for each in made.recipe["search"]["fusions"]} == {"reestimated"}
    assert {each["norms"] for each in made.recipe["search"]["members"]} == {"reestimated"}
    made = zoo.fuse([one, two], "task_arithmetic", base=one, data=data, norms="repair",
                    search={"scale": [0.5, 1.0]})
    assert {each["norms"] for each in made.recipe["search"]["fusions"]} == {"repaired"}
    made = zoo.fuse([one, two], "rebasin", data=data, norms="repair", search={"restarts": [1, 2]})
    assert {each["norms"] for each in made.recipe["search"]["fusions"]} == {"repaired"}


def test_strategies_that_learn_never_see_the_judging_half() -> None:
    _, one, two = models()
    seen: list[int] = []
    import zoo.fusion.weights.regmean as module

    real = module.input_grams

    def counting(net: Any, state: Any, keys: Any, data: Any) -> Any:
        seen.append(sum(len(batch) for batch in data))
        return real(net, state, keys, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "input_grams", counting)
        zoo.fuse([one, two], "regmean", data=images(), search={"damping": [0.5, 0.9]})
    assert set(seen) == {60}


def test_a_greedy_soup_judges_on_all_images_where_nothing_learns_from_them() -> None:
    _, one, two = models()
    made = zoo.fuse([one, two], "greedy_soup", data=images())
    told = {each["member"]: each["score"] for each in made.recipe["report"]["members"]}
    assert told == {1: accuracy(one), 2: accuracy(two)}
    assert accuracy(made) >= max(told.values())


def test_what_cannot_be_searched_is_said_before_any_work() -> None:
    base, one, two = models()
    with pytest.raises(FusionError, match="values are searched on held-out images, and none"):
        zoo.fuse([one, two], "task_arithmetic", base=base, search={"scale": "0..1"})
    with pytest.raises(OptionError, match="no option is called 'skale'; did you mean 'scale'"):
        zoo.fuse([one, two], "task_arithmetic", base=base, data=images(), search={"skale": "0..1"})
    with pytest.raises(OptionError, match="the option 'scale' is given and searched; choose one"):
        zoo.fuse([one, two], "task_arithmetic", base=base, data=images(), scale=1.0,
                 search={"scale": "0..1"})
    with pytest.raises(OptionError, match="search belongs to fusions of weights; leave it out"):
        zoo.fuse([one, two], "mean", data=images(), search={"of": ["logits"]})
    with pytest.raises(OptionError, match="the option 'normalise' is 3"):
        zoo.fuse([one, two], "task_arithmetic", base=base, data=images(),
                 search={"normalise": [True, 3]})


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    rows = ["path,label"]
    for number in range(0, 120, 3):
        image, label = images()[number]
        name = f"{number}.png"
        Image.fromarray((image[0] * 255).byte().numpy()).save(tmp_path / name)
        rows.append(f"{name},{label}")
    (tmp_path / "val.csv").write_text("\n".join(rows))
    for name, model in zip(("base", "one", "two"), models(), strict=True):
        zoo.save(model, tmp_path / name)

    def run(*search: str) -> int:
        words = ["fuse", "one", "two", "--with", "ties", "--base", "base", "--data", "val.csv",
                 "-o", "out"]
        with pytest.raises(SystemExit) as end:
            main([str(tmp_path / word) if word in ("one", "two", "base", "val.csv", "out") else word
                  for word in words] + [part for each in search for part in ("--search", each)])
        return int(str(end.value.code or 0))

    assert run("scale=0.5..1.5", "density=[0.2, 1.0]") == 0
    told = zoo.load(tmp_path / "out", device="cpu").recipe["search"]
    assert told["space"] == {"scale": "0.5..1.5", "density": [0.2, 1.0]}
    assert run("0.5..1.5") == 2
    assert "names no option; write scale=0.3..1.5" in " ".join(capsys.readouterr().err.split())
