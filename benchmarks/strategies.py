"""Test accuracy of every fusion of features and outputs beside the members alone.

    python benchmarks/strategies.py --data digits --members lite
    python benchmarks/strategies.py --data digits --members unlike
    python benchmarks/strategies.py --data mnist --members lite --train 2000 --test 3000

Every split draws training, validation (a fifth of the drawn images) and test images; every seed
draws initial weights and the order of training. Members train on the training images; so do the
heads of feature fusions, on frozen members; fusions of outputs that learn are fitted on the
validation images. The best single member is the one that is best on the validation images. All
settings are fixed beforehand; nothing looks at the test images.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from scipy import stats

import zoo
from zoo.datasets import join
from zoo.measures import mcnemar
from zoo.model import Model
from zoo.registry import find
from zoo.specs import FusionSpec

HEAD = {"epochs": 10, "lr": 1e-3, "schedule": "cosine"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--members", choices=["lite", "unlike"], default="lite")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1000, help="with the validation images")
    parser.add_argument("--test", type=int, default=797)
    parser.add_argument("--only", default="*", help="strategies, a pattern")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    try:
        for split in range(given.splits):
            drawn, test = images(given, split)
            train, validation = drawn.split(0.2, seed=split)
            for seed in range(given.seeds):
                for name, correct in one(given, train, validation, test, 100 * split + seed):
                    right[name].append(correct)
                print(f"split {split}, seed {seed} done", file=sys.stderr, flush=True)
    finally:
        print_table(right, given)


def images(given: argparse.Namespace, split: int) -> tuple[Any, Any]:
    if given.data == "mnist":
        return (zoo.load_data("zoo/mnist", split="train", limit=given.train, seed=split,
                              image_size=64),
                zoo.load_data("zoo/mnist", split="test", limit=given.test, seed=split,
                              image_size=64))
    train, test = (zoo.load_data("zoo/digits", split=part, image_size=64)
                   for part in ("train", "test"))
    every = join([train, test])
    rest, held_out = every.split(given.test / len(every), seed=split)
    return rest.take(given.train, seed=split), held_out


def one(given: argparse.Namespace, train: Any, validation: Any, test: Any, seed: int) -> Any:
    """(name, right or wrong for each test image) of all models of one split and seed."""
    members = made(given, train, seed)
    on_validation = [zoo.evaluate(member, validation).accuracy for member in members]
    on_test = [zoo.evaluate(member, test).correct for member in members]
    for number, (member, correct) in enumerate(zip(members, on_test, strict=True), 1):
        yield f"member {number}, {member.name}", correct
    yield "best single", on_test[on_validation.index(max(on_validation))]
    for kind in ("features", "outputs"):
        for name in zoo.list_fusions(f"zoo/{given.only}", kind=kind):
            if name == "zoo/auto":
                continue
            spec = find(name, FusionSpec)
            learns = kind == "outputs" and "labels" in spec.uses
            fused = zoo.fuse(members, name, data=validation if learns else None, seed=seed)
            if kind == "features":
                zoo.transfer(fused, train, "linear_probe", seed=seed, **HEAD)
            yield f"`{name.removeprefix('zoo/')}`", zoo.evaluate(fused, test).correct


def made(given: argparse.Namespace, train: Any, seed: int) -> list[Model]:
    members = []
    for number in range(3 if given.members == "lite" else 1):
        model = zoo.backbone(f"lite/efficientnet_lite{number}", pretrained=True, num_classes=10,
                             image_size=64, seed=seed + number)
        zoo.transfer(model, train, "linear_probe", epochs=20, lr=0.03, optimizer="sgd", seed=seed)
        members.append(model)
    if given.members == "unlike":
        for name, size in (("zoo/mnist_cnn", 28), ("timm/resnet10t", 32), ("timm/test_vit", 32)):
            model = zoo.backbone(name, num_classes=10, image_size=size, seed=seed)
            zoo.transfer(model, train, "finetune", epochs=20, lr=2e-3, schedule="cosine", seed=seed)
            members.append(model)
    return members


def print_table(right: dict[str, list[torch.Tensor]], given: argparse.Namespace) -> None:
    """Paired: the difference to the best single member, averaged over the seeds of each split. Its
    test over the splits is Nadeau & Bengio's corrected t-test (2003), since their images overlap;
    McNemar's test is over all test images of the first seed of each split."""
    runs = len(right["best single"])
    splits = runs // given.seeds
    best = accuracies(right["best single"])
    print(f"{given.data}, {given.train} images, {splits} splits × {given.seeds} seeds\n\n"
          "| | test accuracy, % | minus best single | better in | p over splits | p over images |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for name, each in right.items():
        values = accuracies(each)
        spread = values.std(ddof=1) if runs > 1 else 0.0
        line = f"| {name} | {values.mean():.2f} ± {spread:.2f}"
        if name == "best single" or len(each) != runs:
            print(f"{line} | – | – | – | – |")
            continue
        difference = values - best
        first = slice(None, None, given.seeds)
        images = mcnemar(torch.cat(each[first]), torch.cat(right["best single"][first]))["p"]
        print(f"{line} | {difference.mean():+.2f} | {(difference > 0).sum()} of {runs} | "
              f"{corrected(difference[:splits * given.seeds], given):.1g} | {images:.1g} |")


def corrected(difference: Any, given: argparse.Namespace) -> float:
    """Two-sided p of the mean difference being zero."""
    each = difference.reshape(-1, given.seeds).mean(1)
    if len(each) < 2 or not each.std():
        return float(not each.any())
    scale = (1 / len(each) + given.test / given.train) ** 0.5
    return float(2 * stats.t.sf(abs(each.mean()) / (each.std(ddof=1) * scale), len(each) - 1))


def accuracies(each: list[torch.Tensor]) -> Any:
    return 100 * np.array([float(run.float().mean()) for run in each])


if __name__ == "__main__":
    main()
