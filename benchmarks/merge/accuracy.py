"""Test accuracy of every way of merging weights, on fine-tunes of one EfficientNet-Lite0.

    python benchmarks/merge/accuracy.py --rows rows.jsonl --seeds 0
    python benchmarks/merge/accuracy.py --rows rows.jsonl --seeds 1 --skip long search regmean …
    python benchmarks/merge/accuracy.py --rows rows.jsonl --table

ImageNet weights are probed on MNIST at 64 px; from that base, with its head, three members are
fine-tuned on different thirds of the training images with other seeds and augmentations, once with
batch norm frozen and once trained. Every strategy merges them, with running statistics pooled and
re-estimated (a few also repaired). Nothing is chosen on the test images; strategies that learn,
and new statistics, get validation images of their own. For comparison: the members, the mean of
their outputs, and one model trained on all thirds, for as many steps as one member and as all
together.

The half with trained batch norm starts from statistics that are estimated on the training images
before the head is probed: a head that was probed on ImageNet's statistics is lost in the first
training step, which normalises by the batch. Each member's own statistics are estimated again on
its own third after training, because its last steps' lie behind its weights.

Rows are appended as they come; an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.assembly.given import reestimate_norms
from zoo.errors import ZooError
from zoo.model import Model
from zoo.registry import find
from zoo.specs import FusionSpec

AUGMENTATIONS: tuple[Any, ...] = (
    None,
    {"hflip": 0.0, "scale": [0.8, 1.0], "ratio": [0.9, 1.1]},
    {"hflip": 0.0, "scale": [0.6, 1.0], "ratio": [0.8, 1.25]},
)
# By the members' accuracy on validation images, among 1e-4, 3e-4; 5e-4, 1e-3.
LR = {"frozen": 1e-4, "trained": 1e-3}
# Beside the defaults of every strategy.
REPAIRED = tuple(f"zoo/{name}" for name in (
    "average", "breadcrumbs", "consensus", "dare_linear", "iso_c", "lines", "pcb", "sce",
    "task_arithmetic", "ties"))
VARIANTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "zoo/task_arithmetic": ({"scale": 1 / 3}, {"search": {"scale": "0.1..1.0"}}),
    "zoo/ties": ({"search": {"scale": "0.2..1.5"}},),
    "zoo/della": ({"ranks": "binned"},),
    "zoo/della_linear": ({"scale": 1 / 3}, {"scale": 1 / 3, "ranks": "binned"}),
    "zoo/dare_linear": ({"scale": 1 / 3},),
    "zoo/breadcrumbs": ({"scale": 1 / 3},),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True, help="where rows are kept, as JSON")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--halves", nargs="+", default=[*LR], choices=[*LR])
    parser.add_argument("--train", type=int, default=3000, help="images, for all members together")
    parser.add_argument("--validation", type=int, default=400)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--only", default="*", help="strategies, a pattern")
    parser.add_argument("--skip", nargs="*", default=[], help="strategies to leave out, searches "
                        "(search) and the long baseline (long), for further seeds")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if not given.table:
        test = zoo.load_data("zoo/mnist", split="test", limit=given.test, image_size=64)
        for seed in given.seeds:
            for half in given.halves:
                one_seed(given, half, seed, test)
    print_table(given.rows)


class Rows:
    """The rows of one half and seed; those that are there already are left out."""

    def __init__(self, file: Path, half: str, seed: int) -> None:
        self.file = file
        self.about = {"half": half, "seed": seed}
        self.known = {(row["row"], row["column"]) for row in read(file)
                      if row["half"] == half and row["seed"] == seed}

    def wants(self, row: str, column: str = "") -> bool:
        return (row, column) not in self.known

    def add(self, row: str, column: str, seconds: float, **measured: float) -> None:
        told = {**self.about, "row": row, "column": column, "seconds": round(seconds, 2),
                **{name: round(100 * value, 2) for name, value in measured.items()}}
        with self.file.open("a") as out:
            out.write(json.dumps(told) + "\n")
        print(told, file=sys.stderr, flush=True)


def one_seed(given: argparse.Namespace, half: str, seed: int, test: Any) -> None:
    """Train, merge and measure everything, for one draw of images and seeds."""
    rows = Rows(given.rows, half, seed)
    images = zoo.load_data("zoo/mnist", split="train", limit=given.train + given.validation,
                           image_size=64, seed=seed)
    train, validation = images.split(given.validation / len(images), seed=seed)
    base = zoo.backbone("lite/efficientnet_lite0", pretrained=True, num_classes=10, image_size=64,
                        seed=seed)
    if half == "trained":
        reestimate_norms(base, train)
    zoo.transfer(base, train, "linear_probe", epochs=10, lr=0.03, optimizer="sgd", seed=seed)
    thirds = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).chunk(3)
    members = [tuned(base, train.subset(part), half, seed * 10 + number, augment, given.epochs)
               for number, (part, augment) in enumerate(zip(thirds, AUGMENTATIONS, strict=True))]
    alone = {"the base, probed": base,
             **{f"member {number}": member for number, member in enumerate(members, 1)}}
    for name, model in alone.items():
        if rows.wants(name):
            rows.add(name, "", 0, accuracy=accuracy(model, test),
                     validation=accuracy(model, validation))
    for name, epochs in (("one model on all thirds, a member's steps", given.epochs // 3),
                         ("one model on all thirds, all members' steps", given.epochs)):
        if rows.wants(name) and not (epochs == given.epochs and "long" in given.skip):
            model = tuned(base, train, half, seed, None, max(epochs, 1))
            rows.add(name, "", 0, accuracy=accuracy(model, test))
    if rows.wants("mean of outputs"):
        rows.add("mean of outputs", "", 0, accuracy=accuracy(zoo.fuse(members, "mean"), test))
    fused: Model | None = None
    for name in zoo.list_fusions(f"zoo/{given.only}", kind="weights"):
        spec = find(name, FusionSpec)
        started = base if "base" in spec.uses else None
        many = members[:spec.members[1]] if spec.members[1] else members
        if name.removeprefix("zoo/") in given.skip:
            continue
        for options in ({}, *VARIANTS.get(name, ())):
            if "search" in options and "search" in given.skip:
                continue
            row = spelled(name, options)
            again = "score" in spec.uses or "search" in options  # they choose under a treatment
            few = name in REPAIRED and not options
            # New statistics destroy every merge of members with frozen ones: once is enough.
            ways = ["pooled", *(["reestimated"] if half == "trained" or not seed else []),
                    *(["repair"] if few else [])]
            for norms in ways:
                if not rows.wants(row, norms):
                    continue
                begun = time.perf_counter()
                try:
                    if norms == "reestimated" and not again and fused is not None:
                        reestimate_norms(fused, validation)  # what norms="reestimated" does
                    else:
                        fused = zoo.fuse(many, name, base=started, data=validation, norms=norms,
                                         seed=seed, **options)
                except ZooError as error:
                    print(f"{row}, {norms}: {error}", file=sys.stderr)
                    break
                rows.add(row, norms, time.perf_counter() - begun, accuracy=accuracy(fused, test))
            fused = None


def tuned(
    base: Model, images: Any, half: str, seed: int, augment: Any, epochs: int
) -> Model:
    model = copy.deepcopy(base)
    zoo.transfer(model, images, "finetune", epochs=epochs, lr=LR[half], batch_size=32, seed=seed,
                 schedule="cosine", norms="train" if half == "trained" else "frozen",
                 augment=augment)
    if half == "trained":
        reestimate_norms(model, images)
    return model


def spelled(name: str, options: Mapping[str, Any]) -> str:
    def told(option: str, value: Any) -> str:
        if option == "search":
            return ", ".join(f"{each} searched" for each in value)
        return f"{option} {value:.2f}" if isinstance(value, float) else f"{value} {option}"

    return ", ".join([name.removeprefix("zoo/"), *(told(*each) for each in options.items())])


def accuracy(model: Model, data: Any) -> float:
    return float(zoo.evaluate(model, data).accuracy)


def read(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        yield from map(json.loads, file.read_text().splitlines())


def print_table(file: Path) -> None:
    found: dict[tuple[str, str], dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in read(file):
        found[row["half"], row["row"]][row["column"]].append(row)
    columns = sorted({column for table in found.values() for column in table} - {""})
    for half in LR:
        print(f"\nBatch norm {half} in the members, test accuracy in %:\n")
        print("| | " + " | ".join([*columns, "seeds", "seconds"]) + " |")
        print("| --- " * (len(columns) + 3) + "|")
        for (of, row), table in found.items():
            if of != half:
                continue
            plain = table.get("", [])
            cells = [spread(table.get(column) or (plain if column == columns[0] else []))
                     for column in columns]
            every = next(iter(table.values()))
            seconds = statistics.mean(each["seconds"] for each in table.get("pooled", every))
            print(f"| {row} | " + " | ".join([*cells, str(len(every)),
                                              f"{seconds:.1f}" if seconds else "–"]) + " |")


def spread(rows: list[Any]) -> str:
    if not rows:
        return "–"
    values = [row["accuracy"] for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
