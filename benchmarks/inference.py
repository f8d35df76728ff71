"""Fused inference beside plain PyTorch: unlike members, and where like members gain from stacking.

    python benchmarks/inference.py

Each row is one ensemble (mean of outputs, 64 px, random weights). plain: timm networks one after
another, resized and normalised by hand, probabilities averaged. zoo: the fused model as it is made,
and after `zoo.speed_up`. ways: seconds of each way as speed_up measured it. All in one process,
taking turns, the fastest of `--rounds`.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import zoo
from zoo.model import Model

ENSEMBLES = {
    "lite0, resnet18, vit_tiny": ("tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224"),
    "lite0, lite1, lite2": ("tf_efficientnet_lite0", "tf_efficientnet_lite1",
                            "tf_efficientnet_lite2"),
    "vgg11, resnet18, mobilenetv3_small": ("vgg11", "resnet18", "mobilenetv3_small_100"),
    "3 mobilenetv3_small": ("mobilenetv3_small_100",) * 3,
    "3 resnet18": ("resnet18",) * 3,
    "3 lite0": ("tf_efficientnet_lite0",) * 3,
    "3 vit_tiny": ("vit_tiny_patch16_224",) * 3,
    "8 mobilenetv3_small": ("mobilenetv3_small_100",) * 8,
    "8 test_resnet": ("test_resnet",) * 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    print(f"{given.threads} threads, torch {torch.__version__}, {given.precision}\n")
    print("| members | batch | plain, ms | zoo | after speed_up | one after another | stacked | "
          "side by side | chosen |\n|" + " --- |" * 9)
    for name, networks in ENSEMBLES.items():
        model = zoo.fuse([zoo.backbone(f"timm/{network}", num_classes=10, image_size=64, seed=seed,
                                       device="cpu") for seed, network in enumerate(networks)],
                         "mean")
        for batch in given.batches:
            print(row(name, model, batch, given), flush=True)


@torch.inference_mode()
def row(name: str, model: Model, batch: int, given: Any) -> str:
    images = torch.rand(batch, 3, 64, 64)
    fast = copy.deepcopy(model)
    speed = zoo.speed_up(fast, batch_size=batch, precision=given.precision)
    plain = by_hand(model)
    torch.testing.assert_close(plain(images), model(images).exp(), rtol=1e-4, atol=1e-5)
    times = best([plain, model, fast], images, given.rounds)
    ways = [f"{1000 * speed.seconds[way]:.1f}" if way in speed.seconds else "–"
            for way in ("one after another", "stacked", "side by side")]
    return (f"| {name} | {batch} | {1000 * times[0]:.1f} | {times[0] / times[1]:.2f} × | "
            f"{times[0] / times[2]:.2f} × | {' | '.join(ways)} | {speed.chosen} |")


def by_hand(model: Model) -> Callable[[Tensor], Tensor]:
    """The same networks in a plain loop."""
    parts = [(copy.deepcopy(member.net), member.mean.clone(), member.std.clone())
             for member in model.each_member()]

    def run(images: Tensor) -> Tensor:
        total = torch.zeros(())
        for network, mean, std in parts:
            total = total + functional.softmax(network((images - mean) / std), 1)
        return total / len(parts)

    return run


def best(runs: list[Any], images: Tensor, rounds: int) -> list[float]:
    times = [float("inf")] * len(runs)
    for _ in range(rounds):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run(images)
            times[number] = min(times[number], time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
