"""What it saves to run frozen members once: the head of a feature fusion of EfficientNet-Lite0,
-Lite1 and -Lite2 at 64 pixels, trained on MNIST. CPU seconds of the whole training, extraction
included: with nothing kept before (cold), and with what the first run left on the disk (warm, as
in a new process), beside the same training that runs the members in every epoch. Of the latter one
epoch is timed, and multiplied by the number of epochs.

    OMP_NUM_THREADS=1 python benchmarks/feature_head.py [--train 10000] [--epochs 20]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

import zoo
from zoo.cache.kept import kept_files
from zoo.datasets import ImageData, load_data
from zoo.features import forget
from zoo.model import Model
from zoo.transfers.objective import Objective

MEMBERS = [f"lite/efficientnet_lite{number}" for number in range(3)]


def fused() -> Model:
    members = [zoo.backbone(name, num_classes=10, pretrained=True, image_size=64, device="cpu")
               for name in MEMBERS]
    return zoo.fuse(members, "concat", num_classes=10, device="cpu", seed=0)


def trained(model: Model, data: ImageData, epochs: int) -> float:
    """CPU seconds of training the head."""
    forget()  # as a new process begins
    start = time.process_time()
    zoo.transfer(model, data, "linear_probe", epochs=epochs)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train = load_data("mnist", limit=asked.train)
    test = load_data("mnist", role="test", limit=asked.test)
    row: dict[str, float] = {"images": len(train), "epochs": asked.epochs}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ZOO_CACHE"] = str(Path(folder))
        for name in ("cold", "warm"):
            model = fused()
            row[f"{name}_cpu_seconds"] = trained(model, train, asked.epochs)
            row[f"{name}_accuracy"] = zoo.evaluate(model, test).accuracy
        row["megabytes_on_disk"] = sum(each.size for each in kept_files()) / 1e6
    model = fused()
    Objective.needs_images = True
    row["every_epoch_cpu_seconds"] = asked.epochs * trained(model, train, 1)
    for name in ("cold", "warm"):
        row[f"{name}_times_less"] = row["every_epoch_cpu_seconds"] / row[f"{name}_cpu_seconds"]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
