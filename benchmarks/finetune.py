"""What the loop costs beside a hand-written one: full fine-tuning of the same network, with the
same batches and optimiser, in CPU seconds per step, the two by turns.

    OMP_NUM_THREADS=1 python benchmarks/finetune.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
from torch.nn import functional

import zoo
from zoo.datasets import ImageData, index_batches, load_data
from zoo.model import Model

BATCH = 64


def by_hand(model: Model, data: ImageData, epochs: int) -> None:
    images, _ = data.batch(range(len(data)))
    labels = data.labels
    assert labels is not None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    for epoch in range(epochs):
        for batch in index_batches(len(data), BATCH, shuffle=True, epoch=epoch):
            rows = torch.tensor(batch)
            loss = functional.cross_entropy(model(images[rows].float() / 255), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def through_zoo(model: Model, data: ImageData, epochs: int) -> None:
    zoo.transfer(model, data, "finetune", epochs=epochs, batch_size=BATCH, norms="train")


def measure(name: str, images: int, epochs: int, repeats: int, **built: int) -> dict[str, object]:
    data = load_data("mnist", limit=images)
    fresh = zoo.backbone(name, num_classes=10, device="cpu", seed=0, **built)
    steps = epochs * -(-images // BATCH)
    ratios, seconds = [], []
    for repeat in range(repeats + 1):
        spent = {}
        for loop in (by_hand, through_zoo) if repeat % 2 else (through_zoo, by_hand):
            model = copy.deepcopy(fresh)
            start = time.process_time()
            loop(model, data, epochs)
            spent[loop] = (time.process_time() - start) / steps
        if repeat:  # the first is a warm-up
            ratios.append(spent[through_zoo] / spent[by_hand])
            seconds.append(spent[by_hand])
    return {"network": name, "steps": steps, "repeats": repeats,
            "ms_per_step_by_hand": 1e3 * statistics.median(seconds),
            "ratio_median": statistics.median(ratios), "ratios": sorted(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    for row in (measure("mnist_cnn", 3200, 2, repeats),
                measure("timm/resnet18", 640, 1, repeats, image_size=64)):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
