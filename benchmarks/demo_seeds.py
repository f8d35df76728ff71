"""Run a recipe with several seeds, which also draw the training images, and print what holds.

    python benchmarks/demo_seeds.py --seeds 5
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import yaml

import zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("examples/digits.yaml"))
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, …")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    given = parser.parse_args()
    recipe = yaml.safe_load(given.recipe.read_text("utf-8"))
    reports = [zoo.run(seeded(recipe, seed), given.out / str(seed)).report
               for seed in range(given.seeds)]
    print("\n".join([*stages(reports), "", *pairs(reports)]))


def seeded(recipe: dict[str, Any], seed: int) -> dict[str, Any]:
    """The recipe with this seed, for everything that is drawn: weights, order, training images."""
    copied = copy.deepcopy(recipe)
    copied["seed"] = seed
    target = copied["data"]["target"]
    train = target["train"]
    target["train"] = {**({"data": train} if isinstance(train, str) else train), "seed": seed}
    return copied


def stages(reports: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation of each stage over the seeds."""
    lines = ["| | accuracy | NLL | ECE | each seed |", "| --- | --- | --- | --- | --- |"]
    for name in reports[0]["stages"]:
        rows = [report["stages"][name] for report in reports]
        accuracies = [100 * row["accuracy"] for row in rows]
        each = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        lines.append(f"| {name} | {spread(accuracies, 2)} % | "
                     f"{spread([row['nll'] for row in rows], 4)} | "
                     f"{spread([row['ece'] for row in rows], 4)} | {each} |")
    return lines


def pairs(reports: list[dict[str, Any]]) -> list[str]:
    """How often the first of two stages is right alone, the second, and p of each seed's test."""
    lines = ["| | better in | by more than chance in | p of each seed |",
             "| --- | --- | --- | --- |"]
    for position, first in enumerate(reports[0]["tests"]):
        tests = [report["tests"][position] for report in reports]
        wins = [test for test in tests if test["only_a"] > test["only_b"]]
        clear = sum(test["p"] < 0.05 for test in wins)
        p = ", ".join("< 1e-15" if test["p"] < 1e-15 else f"{test['p']:.1g}" for test in tests)
        lines.append(f"| {first['a']} against {first['b']} | {len(wins)} of {len(tests)} | "
                     f"{clear} of {len(tests)} | {p} |")
    return lines


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
