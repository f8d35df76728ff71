"""Test accuracy of every way of merging weights, on fine-tunes of one EfficientNet-Lite0.

    python benchmarks/merge/accuracy.py --seeds 3 > table.md

ImageNet weights are probed on MNIST at 64 px; from that base, with its head, three members are
fine-tuned on different thirds of the training images with other seeds and augmentations, once with
batch norm frozen and once trained. Every strategy merges them, with running statistics pooled and
re-estimated. No choice is made on the test images; strategies that learn get validation images of
their own. For comparison: the members, the mean of their outputs, and one model trained on all
thirds for as many steps as one member.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import warnings
from collections import defaultdict
from typing import Any

import torch

import zoo
from zoo.errors import ZooError
from zoo.model import Model
from zoo.registry import find
from zoo.specs import FusionSpec

AUGMENTATIONS: tuple[Any, ...] = (
    None,
    {"hflip": 0.0, "scale": [0.8, 1.0], "ratio": [0.9, 1.1]},
    {"hflip": 0.0, "scale": [0.6, 1.0], "ratio": [0.8, 1.25]},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=3000, help="images, for all members together")
    parser.add_argument("--validation", type=int, default=500)
    parser.add_argument("--test", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--only", default="*", help="strategies, a pattern")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    test = zoo.load_data("zoo/mnist", split="test", limit=given.test, image_size=64)
    rows: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    try:
        for seed in range(given.seeds):
            for norms in ("frozen", "trained"):
                for row, column, accuracy in one_seed(given, norms, seed, test):
                    rows[row, norms][column].append(100 * accuracy)
    finally:
        print_table(rows)  # what there is, after Ctrl-C too


def one_seed(given: argparse.Namespace, norms: str, seed: int, test: Any) -> Any:
    """(row, column, accuracy) of everything, for one draw of images and seeds."""
    images = zoo.load_data("zoo/mnist", split="train", limit=given.train + given.validation,
                           image_size=64, seed=seed)
    train, validation = images.split(given.validation / len(images), seed=seed)
    base = zoo.backbone("lite/efficientnet_lite0", pretrained=True, num_classes=10, image_size=64,
                        seed=seed)
    zoo.transfer(base, train, "linear_probe", epochs=10, lr=0.03, optimizer="sgd", seed=seed)
    thirds = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).chunk(3)
    members = [tuned(base, train.subset(part), norms, seed * 10 + number, augment, given)
               for number, (part, augment) in enumerate(zip(thirds, AUGMENTATIONS, strict=True))]
    everything = tuned(base, train, norms, seed, None, given, epochs=max(given.epochs // 3, 1))
    yield "the base, probed", "", accuracy(base, test)
    for number, member in enumerate(members, 1):
        yield f"member {number}", "", accuracy(member, test)
    yield "one model on all thirds", "", accuracy(everything, test)
    yield "mean of outputs", "", accuracy(zoo.fuse(members, "mean"), test)
    for name in zoo.list_fusions(f"zoo/{given.only}", kind="weights"):
        spec = find(name, FusionSpec)
        started = base if "base" in spec.uses else None
        many = members[:spec.members[1]] if spec.members[1] else members
        for treatment in ("pooled", "reestimated"):
            try:
                fused = zoo.fuse(many, name, base=started, data=validation, norms=treatment,
                                 seed=seed)
            except ZooError as error:
                print(f"{name}, {treatment}: {error}", file=sys.stderr)
                continue
            yield name, treatment, accuracy(fused, test)
        print(f"{norms} {seed} {name} done", file=sys.stderr, flush=True)


def tuned(
    base: Model, images: Any, norms: str, seed: int, augment: Any, given: argparse.Namespace,
    epochs: int | None = None,
) -> Model:
    model = copy.deepcopy(base)
    zoo.transfer(model, images, "finetune", epochs=epochs or given.epochs, lr=given.lr, seed=seed,
                 norms="train" if norms == "trained" else "frozen", augment=augment)
    return model


def accuracy(model: Model, data: Any) -> float:
    return float(zoo.evaluate(model, data).accuracy)


def print_table(rows: Any) -> None:
    for norms in ("frozen", "trained"):
        print(f"\nBatch norm {norms} in the members, test accuracy in %:\n")
        print("| | statistics as fused | re-estimated | seeds |\n| --- | --- | --- | --- |")
        for (row, treated), columns in rows.items():
            if treated == norms:
                plain = columns.get("pooled") or columns.get("", [])
                print(f"| {row} | {spread(plain)} | {spread(columns.get('reestimated', []))} | "
                      f"{len(plain)} |")


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
