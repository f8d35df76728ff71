"""What it saves to run a frozen trunk once: a 10-epoch linear probe of EfficientNet-Lite0 at 64
pixels on 5,000 MNIST images, beside the plain loop that runs the backbone in every epoch. Accuracy
on 2,000 test images, CPU seconds of both in one run.

    OMP_NUM_THREADS=1 python benchmarks/linear_probe.py [--train 5000] [--epochs 10]
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch.nn import functional

import zoo
from zoo.datasets import ImageData, index_batches, load_data
from zoo.features import forget
from zoo.model import Model

BATCH = 64


def plain(model: Model, data: ImageData, epochs: int) -> None:
    images, _ = data.batch(range(len(data)))
    labels = data.labels
    assert labels is not None
    model.requires_grad_(False)
    head = list(model.head_parameters())
    for parameter in head:
        parameter.requires_grad_(True)
    model.eval()
    optimizer = torch.optim.Adam(head, lr=1e-3)
    for epoch in range(epochs):
        for batch in index_batches(len(data), BATCH, shuffle=True, epoch=epoch):
            rows = torch.tensor(batch)
            loss = functional.cross_entropy(model(images[rows].float() / 255), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def through_zoo(model: Model, data: ImageData, epochs: int) -> None:
    forget()
    zoo.transfer(model, data, "linear_probe", epochs=epochs, batch_size=BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=5000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    train = load_data("mnist", limit=asked.train)
    test = load_data("mnist", role="test", limit=asked.test)
    row: dict[str, float] = {"images": len(train), "epochs": asked.epochs}
    for loop in (through_zoo, plain):
        model = zoo.backbone("lite/efficientnet_lite0", num_classes=10, pretrained=True,
                             image_size=64, device="cpu", seed=0)
        start = time.process_time()
        loop(model, train, asked.epochs)
        row[f"{loop.__name__}_cpu_seconds"] = time.process_time() - start
        row[f"{loop.__name__}_accuracy"] = zoo.evaluate(model, test).accuracy
    row["times_less"] = row["plain_cpu_seconds"] / row["through_zoo_cpu_seconds"]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
