"""`report.json` for programs and `report.md` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.tensors import atomic_file


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write both files into a folder, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"),
                       ("report.md", markdown(report))):
        with atomic_file(folder / name) as file:
            file.write(text.encode())


def markdown(report: Mapping[str, Any]) -> str:
    """The report of a run as Markdown: the stages side by side, the paired tests, the verdict."""
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
            [(name, *(_percent(stage["attacks"][attack]["accuracy"]) for attack in attacks),
              _percent(stage["robust"])) for name, stage in report["stages"].items()])]
    notes = [f"- {name}: {note}" for name, stage in report["stages"].items()
             for note in stage["notes"]]
    if notes:
        lines += ["", "## Notes", "", *notes]
    lines += ["", f"Seed {report['seed']}, zoo {report['zoo']}, {report['seconds']:.0f} seconds."]
    return "\n".join(lines) + "\n"


def stage_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per stage: name, model, accuracy, interval, NLL, ECE, parameters, seconds."""
    return [
        (name, stage["model"], _percent(stage["accuracy"]),
         f"{_percent(stage['interval'][0])} – {_percent(stage['interval'][1])}",
         f"{stage['nll']:.4f}", f"{stage['ece']:.4f}", f"{stage['parameters']:,}",
         f"{stage['train_seconds']:.1f}")
        for name, stage in report["stages"].items()
    ]


def test_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per paired test: which against which, both counts, p."""
    return [(f"{test['a']} against {test['b']}", str(test["only_a"]), str(test["only_b"]),
             f"{test['p']:.2g}") for test in report["tests"]]


def verdict(report: Mapping[str, Any]) -> str:
    """Whether the fused model beats source and target by more than chance, in one sentence."""
    outcomes = []
    for other in ("source", "target"):
        test = next(t for t in report["tests"] if t["a"] == "fused" and t["b"] == other)
        if test["p"] >= 0.05:
            outcomes.append(f"is not distinguishable from the {other} (p = {test['p']:.2g})")
        elif test["only_a"] > test["only_b"]:
            outcomes.append(f"beats the {other} (p = {test['p']:.2g})")
        else:
            outcomes.append(f"loses to the {other} (p = {test['p']:.2g})")
    fused = _percent(report["stages"]["fused"]["accuracy"])
    return f"The fused model ({fused}) {outcomes[0]} and {outcomes[1]}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
