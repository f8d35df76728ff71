"""What `auto` costs, and whether choosing pays.

`--part cost`: at least 12 candidates of two members, EfficientNet-Lite0 and Lite1 at 64 pixels
with heads trained on 1,000 images of MNIST, on 5,000 others, with a budget of 50 seconds that are
counted in CPU seconds. CPU seconds of the features that are computed once, and of everything after.

`--part splits`: on many random splits of scikit-learn's digits (200 images to train the members'
heads, 300 to choose on, the rest to test), the same two members: test accuracy of what `auto` takes
beside that of the single member that is best on the images to choose on. Once with output fusions
alone, which only weigh the members' answers, and once with feature fusions too, which also train a
new head on the images to choose on.

    OMP_NUM_THREADS=1 python benchmarks/auto.py --part cost
    OMP_NUM_THREADS=1 python benchmarks/auto.py --part splits [--splits 20]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

import zoo
from zoo.assembly import automatic, material
from zoo.datasets import ImageData, join, load_data
from zoo.features import trunk_features
from zoo.model import Model
from zoo.training import streams

MEMBERS = ("lite/efficientnet_lite0", "lite/efficientnet_lite1")
CHOICES = {
    "outputs": {"strategies": ["zoo/mean", "zoo/weighted"], "trials": 3},
    "outputs and features": {
        "strategies": ["zoo/mean", "zoo/weighted", "zoo/concat"], "trials": 4},
}


def members(data: ImageData, seed: int) -> list[Model]:
    """Pretrained networks with heads that were trained on these images."""
    models = []
    for name in MEMBERS:
        model = zoo.backbone(name, pretrained=True, image_size=64, device="cpu")
        zoo.transfer(model, data, "linear_probe", epochs=20, lr=3e-3, seed=seed)
        models.append(model)
    return models


def cost(budget: float) -> None:
    train, val = load_data("mnist", limit=6000).split(5 / 6, seed=1)
    models = members(train, 0)
    start = time.process_time()
    for model in models:
        trunk_features(model, val)
    features = time.process_time() - start
    automatic.time.perf_counter = time.process_time  # other programs may run beside
    start = time.process_time()
    best = zoo.fuse(models, "auto", data=val, budget=budget)
    seconds = time.process_time() - start
    told = best.recipe["auto"]
    print("| candidate | images | accuracy | over the best single | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for row in told["ranking"]:
        gain = f"{100 * row['gain']:+.2f}" if row["finished"] else ""
        print(f"| {row['name']} | {row['images']:,} | {row['accuracy']:.2%} | {gain} | "
              f"{row['seconds']:.1f} |")
    print(told["reason"])
    print(f"{len(val):,} images, {len(told['ranking'])} candidates, singles among them; CPU "
          f"seconds: pooled features {features:.1f}, all the rest {seconds:.1f}")


def splits(count: int) -> None:
    digits = join([load_data("digits", role=role) for role in ("train", "test")])
    assert digits.labels is not None
    labels = digits.labels
    features = {name: trunk_features(zoo.backbone(name, pretrained=True, image_size=64,
                                                  device="cpu"), digits)[0] for name in MEMBERS}

    def looked_up(model: Model, data: ImageData, *, workers: int = 0) -> tuple[torch.Tensor, ...]:
        return tuple(features[member.name][data._rows] for member in model.each_member())

    # Every split is of the same images, and a fingerprint of a part is not one of the whole.
    streams.trunk_features = material.trunk_features = looked_up

    @torch.no_grad()
    def right(model: Model, rows: torch.Tensor) -> float:
        """The accuracy on these images, from the features of all."""
        parts = [features[member.name][rows] for member in model.each_member()]
        answers = model.classify(model.join(parts)).argmax(1)
        return float((answers == labels[rows]).double().mean())

    found: dict[str, list[tuple[float, float, float, float, str]]] = {name: [] for name in CHOICES}
    for seed in range(count):
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
        train, val, test = order[:200], order[200:500], order[500:]
        models = members(digits.subset(train), seed)
        on_val = [right(model, val) for model in models]
        on_test = [right(model, test) for model in models]
        single = on_test[on_val.index(max(on_val))]
        for name, given in CHOICES.items():
            start = time.process_time()
            best = zoo.fuse(models, "auto", data=digits.subset(val), seed=seed, **given)
            seconds = time.process_time() - start
            accuracy = right(best, test)
            found[name].append((accuracy, single, best.recipe["auto"]["nested_gain"], seconds,
                                best.recipe["auto"]["chosen"]))
            print(f"{seed} {name}: {best.recipe['auto']['chosen']} {accuracy:.4f}, single "
                  f"{single:.4f}, {seconds:.1f} s", flush=True)
    print("| tried | auto, test % | best single, test % | difference, points (95 % interval) | "
          "better / same / worse | promised on validation | CPU seconds of one choice | taken |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        mine, alone, promised, seconds, _ = zip(*rows, strict=True)
        gains = [100 * (a - b) for a, b in zip(mine, alone, strict=True)]
        low, high = interval(gains)
        taken = sorted({row[4] for row in rows}, key=lambda one: -sum(r[4] == one for r in rows))
        told = ", ".join(f"{one} {sum(row[4] == one for row in rows)}" for one in taken)
        print(f"| {name} | {100 * statistics.mean(mine):.2f} | {100 * statistics.mean(alone):.2f} "
              f"| {statistics.mean(gains):+.2f} ({low:+.2f} to {high:+.2f}) | "
              f"{sum(g > 0 for g in gains)} / {sum(g == 0 for g in gains)} / "
              f"{sum(g < 0 for g in gains)} | {100 * statistics.mean(promised):+.2f} | "
              f"{statistics.mean(seconds):.1f} | {told} |")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    from scipy import stats

    low, high = stats.t.interval(0.95, len(values) - 1, loc=statistics.mean(values),
                                 scale=stats.sem(values))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("cost", "splits"), required=True)
    parser.add_argument("--budget", type=float, default=50.0)
    parser.add_argument("--splits", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.part == "cost":
        cost(asked.budget)
    else:
        splits(asked.splits)


if __name__ == "__main__":
    main()
