from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from zoo.evaluation import Evaluation
from zoo.measures import wilson
from zoo.pipeline.content import report_of
from zoo.pipeline.recipes import read_recipe
from zoo.pipeline.steps import Step
from zoo.report import markdown as text_of

RECIPE = read_recipe({
    "data": {"target": {"train": "zoo/digits", "test": "zoo/digits"}},
    "source": {"backbone": "zoo/mnist_cnn"}, "target": {"backbone": "zoo/mnist_cnn"},
    "fuse": {"strategy": "concat"},
})
N = 200


def report(nll: float = 0.5, **right: int) -> dict[str, Any]:
    """The report of stages that got the first so many of 200 images right."""
    measured, steps = {}, {}
    for name, hits in right.items():
        measured[name] = Evaluation(
            n=N, accuracy=hits / N, interval=wilson(hits, N), top5=None, nll=nll, ece=0.01,
            confusion=[[1]], per_class={"0": {"n": 1, "recall": None, "precision": None}},
            parameters=1234, seconds=1.0, correct=torch.arange(N) < hits,
            predictions=torch.zeros(N))
        model = SimpleNamespace(name=f"zoo/{name}", classes=("0", "1"))
        steps[name] = Step(name, "key", cast(Any, model), [f"a note on {name}"], [{"loss": nll}],
                           2.5, kept=False)
    return report_of(RECIPE, steps, measured, {"train": 90, "val": 10, "test": N}, 12.0)


def test_the_tests_are_paired_and_exact() -> None:
    made = report(source=100, target=150, fused=154, updated=160, everything=154)
    pairs = {(test["a"], test["b"]): test for test in made["tests"]}
    assert list(pairs) == [("fused", "source"), ("fused", "target"), ("fused", "updated"),
                           ("fused", "everything"), ("updated", "target")]
    assert pairs["fused", "target"] == {"a": "fused", "b": "target", "only_a": 4, "only_b": 0,
                                        "p": 0.125}
    assert pairs["fused", "everything"]["p"] == 1


def test_a_report_has_every_measure_of_every_stage() -> None:
    made = report(source=100, target=150, fused=154, everything=154)
    assert list(made) == ["stages", "tests", "data", "recipe", "seed", "seconds", "zoo"]
    assert list(made["stages"]) == ["source", "target", "fused", "everything"]
    for stage in made["stages"].values():
        assert {"n", "accuracy", "interval", "nll", "ece", "parameters", "model", "kept",
                "train_seconds", "notes", "history"} <= stage.keys()
    assert made["data"]["classes"] == ["0", "1"]
    assert made["recipe"]["fuse"]["strategy"] == "concat"


def test_json_has_no_numbers_that_json_has_not(tmp_path: Path) -> None:
    made = report(nll=float("inf"), source=1, target=2, fused=3, everything=4)
    assert made["stages"]["fused"]["nll"] is None
    assert made["stages"]["fused"]["history"] == [{"loss": None}]
    text_of.write_report(tmp_path / "new", made)
    text = (tmp_path / "new" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == made
    assert (tmp_path / "new" / "report.md").read_text() == text_of.markdown(made)
    assert text_of.stage_rows(made)[0][4] == "–"


@pytest.mark.parametrize(("fused", "says"), [
    (180, "The fused model (90.00 %) beats the source (50.00 %, p < 1e-15) and beats the target "
          "(75.00 %, p = 1.9e-09). It beats one model trained on everything (zoo/everything, "
          "77.50 %, p = 6e-08)."),
    (152, "The fused model (76.00 %) beats the source (50.00 %, p < 1e-15) and does not differ "
          "by more than chance from the target (75.00 %, p = 0.5). It does not differ by more than "
          "chance from one model trained on everything (zoo/everything, 77.50 %, p = 0.25)."),
    (80, "The fused model (40.00 %) loses to the source (50.00 %, p = 1.9e-06) and loses to the "
         "target (75.00 %, p < 1e-15). It loses to one model trained on everything "
         "(zoo/everything, 77.50 %, p < 1e-15)."),
])
def test_the_verdict_is_plain(fused: int, says: str) -> None:
    made = report(source=100, target=150, fused=fused, everything=155)
    assert text_of.verdict(made) == says


def test_no_p_value_is_printed_as_zero() -> None:
    made = report(source=0, target=0, fused=200, everything=0)
    assert made["tests"][0]["p"] > 0
    assert [row[-1] for row in text_of.test_rows(made)] == ["< 1e-15"] * 3
    made["tests"][0]["p"] = 0.0
    assert "p < 1e-15" in text_of.verdict(made)


def test_the_markdown_shows_stages_tests_and_notes() -> None:
    text = text_of.markdown(report(source=100, target=150, fused=154, updated=160, everything=154))
    assert ("| target | zoo/target | 75.00 % | 68.57 % – 80.49 % | 0.5000 | 0.0100 | 1,234 | 2.5 |"
            in text)
    assert "| fused against target | 4 | 0 | 0.12 |" in text
    assert "- fused: a note on fused" in text
    assert "same 200 test images" in text
    assert "Under attack" not in text
    assert text.endswith("12 seconds.\n")


def test_the_pictures_beside_a_report_are_linked(tmp_path: Path) -> None:
    made = report(source=1, target=2, fused=3, everything=4)
    text_of.write_report(tmp_path, made, {"confusion.png": b"picture"})
    assert (tmp_path / "confusion.png").read_bytes() == b"picture"
    assert "](confusion.png)\n" in (tmp_path / "report.md").read_text()
    assert "![" not in text_of.markdown(made)
