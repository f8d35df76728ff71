"""`report.json` for programs and `report.md` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.atomic import atomic_file
from zoo.report.captions import CAPTIONS


def write_report(
    folder: Path, report: Mapping[str, Any], pictures: Mapping[str, bytes] | None = None
) -> None:
    """Write the files into a folder, each at once. pictures: to lie beside it, by name."""
    pictures = pictures or {}
    folder.mkdir(parents=True, exist_ok=True)
    files = {**pictures,
             "report.json": (json.dumps(report, indent=2, allow_nan=False) + "\n").encode(),
             "report.md": markdown(report, list(pictures)).encode()}
    for name, data in files.items():
        with atomic_file(folder / name) as file:
            file.write(data)


def markdown(report: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The report of a run as Markdown: the stages side by side, the paired tests, the verdict.
    pictures: the names of those that lie beside it."""
    data = report["data"]
    lines = [
        "# Report",
        "",
        verdict(report),
        "",
        f"Every stage on the same {data['test']:,} test images, which nothing was trained or "
        f"chosen on ({data['train']:,} to train, {data['val']:,} to validate).",
        "",
        *_table(("", "model", "accuracy", "95 % interval", "NLL", "ECE", "parameters", "seconds"),
                stage_rows(report)),
        "",
        "## Paired tests",
        "",
        "McNemar's exact test on the images that one of two models alone got right.",
        "",
        *_table(("", "only the first is right", "only the second is right", "p"),
                test_rows(report)),
    ]
    attacks = list(next(iter(report["stages"].values()))["attacks"])
    if attacks:
        lines += ["", "## Under attack", "", *_table(
            ("", *attacks, "all of them"),
            [(name, *(percent(stage["attacks"][attack]["accuracy"]) for attack in attacks),
              percent(stage["robust"])) for name, stage in report["stages"].items()])]
    for name in pictures:
        lines += ["", f"![{CAPTIONS[name]}]({name})"]
    notes = [f"- {name}: {note}" for name, stage in report["stages"].items()
             for note in stage["notes"]]
    if notes:
        lines += ["", "## Notes", "", *notes]
    lines += ["", f"Seed {report['seed']}, zoo {report['zoo']}, {report['seconds']:.0f} seconds."]
    return "\n".join(lines) + "\n"


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per stage: name, model, accuracy, interval, NLL, ECE, parameters, seconds."""
    return [
        (name, stage["model"], percent(stage["accuracy"]),
         f"{percent(stage['interval'][0])} – {percent(stage['interval'][1])}",
         _measure(stage["nll"]), _measure(stage["ece"]), f"{stage['parameters']:,}",
         f"{stage['train_seconds']:.1f}")
        for name, stage in report["stages"].items()
    ]


def test_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per paired test: which against which, both counts, p."""
    return [(f"{test['a']} against {test['b']}", str(test["only_a"]), str(test["only_b"]),
             _p(test["p"])) for test in report["tests"]]


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the fused model beats source and target by more than chance, and how one model
    trained on everything compares: two sentences that take no side."""
    stages = report["stages"]
    tests = {test["b"]: test for test in report["tests"] if test["a"] == "fused"}
    source, target = (f"{_outcome(tests[other])} the {other} "
                      f"({percent(stages[other]['accuracy'])}, {_p_value(tests[other])})"
                      for other in ("source", "target"))
    baseline = (f"It {_outcome(tests['everything'])} one model trained on everything "
                f"({stages['everything']['model']}, "
                f"{percent(stages['everything']['accuracy'])}, {_p_value(tests['everything'])}).")
    return (f"The fused model ({percent(stages['fused']['accuracy'])}) {source} and {target}. "
            f"{baseline}")


def _outcome(test: Mapping[str, Any]) -> str:
    if test["p"] >= 0.05:
        return "does not differ by more than chance from"
    return "beats" if test["only_a"] > test["only_b"] else "loses to"


def _p_value(test: Mapping[str, Any]) -> str:
    return f"p {_p(test['p'])}" if test["p"] < 1e-15 else f"p = {_p(test['p'])}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def percent(share: float) -> str:
    """A share as people write it.

    >>> percent(0.98765)
    '98.77 %'
    """
    return f"{100 * share:.2f} %"


def _p(p: float) -> str:
    # Below this the number says nothing but "impossible", and far below it prints as zero.
    return "< 1e-15" if p < 1e-15 else f"{p:.2g}"


def _measure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
