"""zoo.save and zoo.load of a whole model beside the same work by hand.

    OMP_NUM_THREADS=1 python benchmarks/load_model.py --network vit_base_patch16_224

save: by hand it is safetensors' save_file, fsync and the sha256 of the file. load: by hand the
network is built on the meta device and takes load_file's tensors (assign=True), unread and read
once. Medians of interleaved runs; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import zoo
from zoo.tensors import sha256_file


def main() -> None:
    parser = argparse.ArgumentParser(description="zoo.save and zoo.load against by hand")
    parser.add_argument("--network", default="wide_resnet101_2")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    model = zoo.backbone(f"timm/{options.network}", device="cpu", seed=0)
    state = next(model.each_member()).net.state_dict()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs.safetensors")

        def save_by_hand() -> None:
            save_file(state, theirs, metadata={"format": "pt"})
            with theirs.open("rb") as file:
                os.fsync(file.fileno())
            sha256_file(theirs)

        def load_by_hand() -> torch.nn.Module:
            with torch.device("meta"):
                network = timm.create_model(options.network)
            network.load_state_dict(load_file(theirs), assign=True)
            return network

        def read(network: torch.nn.Module) -> None:
            for tensor in network.state_dict().values():
                tensor.sum()

        size = f"{sum(tensor.nbytes for tensor in state.values()) // 1_000_000} MB"
        print(f"{'job':24} {'':8} {'CPU s':>8} {'wall s':>8}")
        compare(f"save {size}", lambda: zoo.save(model, ours), save_by_hand, options.runs, os.sync)
        compare(f"load {size}", lambda: zoo.load(ours, device="cpu"), load_by_hand, options.runs)
        compare(f"load and read {size}", lambda: read(zoo.load(ours, device="cpu")),
                lambda: read(load_by_hand()), options.runs)


def compare(
    job: str, ours: Callable[[], object], by_hand: Callable[[], object], runs: int,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    times: dict[str, list[tuple[float, float]]] = {"by hand": [], "ours": []}
    for _ in range(runs + 1):
        for who, act in (("by hand", by_hand), ("ours", ours)):
            prepare()
            cpu, wall = time.process_time(), time.perf_counter()
            act()
            times[who].append((time.process_time() - cpu, time.perf_counter() - wall))
    medians = {who: [statistics.median(column) for column in zip(*rows[1:], strict=True)]
               for who, rows in times.items()}  # the first is a warm-up
    ratio = [a / b for a, b in zip(medians["ours"], medians["by hand"], strict=True)]
    for who, (cpu, wall) in {**medians, "ratio": ratio}.items():
        print(f"{job:24} {who:8} {cpu:8.3f} {wall:8.3f}")


if __name__ == "__main__":
    main()
