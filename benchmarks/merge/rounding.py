"""What is left of a fine-tune's task vector when a merge is written as bfloat16.

    python benchmarks/merge/rounding.py

EfficientNet-Lite0 is probed on MNIST at 64 px and published in bfloat16, as the base; a fine-tune
of it, by a gentle and by a usual learning rate, is merged into it with `task_arithmetic` at several
scales and written as float32, and as bfloat16 by both roundings. Kept is the projection of the
written change onto the exact one, <written, exact> / <exact, exact>; noise is what else was
written, relative to the exact change. Stochastic rounding: mean ± sd over seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.model import Model
from zoo.tensors import load_tensors, save_tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-5, 1e-4])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    images, test = (zoo.load_data("zoo/mnist", split=split, limit=limit, image_size=64)
                    for split, limit in (("train", given.train), ("test", given.test)))
    base = zoo.backbone("lite/efficientnet_lite0", pretrained=True, num_classes=10, image_size=64,
                        seed=0)
    zoo.transfer(base, images, "linear_probe", epochs=10, lr=0.03, optimizer="sgd")
    base.to(dtype=torch.bfloat16).to(dtype=torch.float32)
    print(f"The base: {100 * zoo.evaluate(base, test).accuracy:.1f} % of the test images right.\n")
    print("| learning rate | scale | change, of the weights' norm | rounding | kept | noise "
          "| test accuracy, % |\n" + "| --- " * 7 + "|")
    for lr in given.lrs:
        tuned = copy.deepcopy(base)
        zoo.transfer(tuned, images, "finetune", epochs=3, lr=lr, batch_size=32, norms="frozen",
                     schedule="cosine")
        for scale in given.scales:
            report(base, tuned, test, scale, f"{lr:g}", given.seeds)


def report(base: Model, tuned: Model, test: Any, scale: float, lr: str, seeds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("base", base), ("tuned", tuned)):
            save_tensors(net(model).state_dict(), Path(folder, f"{name}.safetensors"))

        def merged(**how: Any) -> dict[str, Tensor]:
            return load_tensors(zoo.merge(
                [Path(folder, "tuned.safetensors")], "task_arithmetic", scale=scale,
                base=Path(folder, "base.safetensors"), out=Path(folder, "out.safetensors"), **how))

        start = net(base).state_dict()
        exact = {key: tensor.clone() for key, tensor in merged().items()}
        wanted = change(exact, start)
        size = float(wanted.norm() / flat(start).norm())
        rows: list[tuple[str, list[dict[str, Any]]]] = [
            ("none (float32)", [{}]),
            ("nearest", [{"dtype": "bfloat16"}]),
            ("stochastic", [{"dtype": "bfloat16", "rounding": "stochastic", "seed": seed}
                            for seed in range(seeds)])]
        for name, ways in rows:
            found: list[tuple[float, float, float]] = []
            for how in ways:
                state = merged(**how)
                written = change(state, start)
                kept = float(written @ wanted / (wanted @ wanted))
                noise = float((written - kept * wanted).norm() / wanted.norm())
                model = copy.deepcopy(base)
                net(model).load_state_dict(state)
                found.append((100 * kept, noise, 100 * zoo.evaluate(model, test).accuracy))
            kept_, noise_, right = (spread(column) for column in zip(*found, strict=True))
            print(f"| {lr} | {scale:g} | {size:.1e} | {name} | {kept_} % | {noise_} | {right} |",
                  flush=True)


def net(model: Model) -> torch.nn.Module:
    return next(model.each_member()).net


def flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in state.values()
                      if tensor.is_floating_point()])


def change(state: dict[str, Tensor], start: dict[str, Tensor]) -> Tensor:
    return flat({key: state[key].double() - start[key].double() for key in start})


def spread(values: Any) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


if __name__ == "__main__":
    main()
