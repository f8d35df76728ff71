"""Robust training of the two-convolution network on all of MNIST: FGSM-RS at ε 0.1, then accuracy
clean and under PGD-40 at ε 0.1 with step 0.01 on the whole test set.

    OMP_NUM_THREADS=1 python benchmarks/robustness.py [--epochs 5] [--seed 0] [--test 10000]
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import zoo
from zoo.datasets import load_data

EPS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=10_000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = zoo.backbone("mnist_cnn", num_classes=10, device="cpu", seed=asked.seed)
    start = time.process_time()
    result = zoo.transfer(model, "mnist", "fgsm_at", epochs=asked.epochs, batch_size=100, lr=5e-3,
                          schedule="cosine", warmup_epochs=min(2, asked.epochs - 1),
                          seed=asked.seed, eps=EPS)
    seconds = time.process_time() - start
    start = time.process_time()
    measured = zoo.evaluate(
        model, load_data("mnist", role="test", limit=asked.test), seed=asked.seed,
        attacks={"fgsm": {"eps": EPS}, "pgd": {"eps": EPS, "steps": 40, "step_size": 0.01}})
    print(json.dumps({
        "epochs": asked.epochs, "seed": asked.seed, "eps": EPS, "notes": result.notes,
        "train_cpu_seconds": seconds, "measure_cpu_seconds": time.process_time() - start,
        "clean": measured.accuracy, "fgsm": measured.attacks["fgsm"]["accuracy"],
        "pgd40": measured.attacks["pgd"]["accuracy"],
        "zero_gradients": measured.attacks["pgd"]["zero_gradients"],
    }))


if __name__ == "__main__":
    main()
