"""Saving and loading beside the safetensors library doing the same work.

    OMP_NUM_THREADS=1 python benchmarks/storage.py --mb 512

save: tensors in memory → file on disk (fsync) and its sha256. load: a network built on the meta
device takes the tensors of a file (assign=True), unread and read once. Medians of interleaved
runs; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

from zoo.tensors import load_tensors, save_tensors, sha256_file

TENSORS = 300
NETWORK = "wide_resnet101_2"  # 507 MB in 627 tensors


def main() -> None:
    parser = argparse.ArgumentParser(description="ours against the safetensors library")
    parser.add_argument("--mb", type=int, default=512, help="size of the file that is saved")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"{'job':24} {'':6} {'CPU s':>8} {'wall s':>8}")
        compare_saving(Path(folder), options.mb, options.runs)
        compare_loading(Path(folder), options.runs)


def compare_saving(folder: Path, megabytes: int, runs: int) -> None:
    tensors = mixed_tensors(megabytes)
    ours, theirs = folder / "ours.safetensors", folder / "theirs.safetensors"

    def save_theirs() -> None:
        save_file(tensors, theirs, metadata={"format": "pt"})
        with theirs.open("rb") as file:
            os.fsync(file.fileno())
        sha256_file(theirs)

    def clean() -> None:
        ours.unlink(missing_ok=True)
        theirs.unlink(missing_ok=True)
        os.sync()

    report(f"save {megabytes} MB", lambda: save_tensors(tensors, ours), save_theirs, runs, clean)
    clean()


def compare_loading(folder: Path, runs: int) -> None:
    file = folder / "model.safetensors"
    save_tensors(timm.create_model(NETWORK).state_dict(), file)

    def load(read: Callable[[Path], dict[str, torch.Tensor]], touch: bool) -> None:
        with torch.device("meta"):
            network = timm.create_model(NETWORK)
        network.load_state_dict(read(file), assign=True)
        if touch:
            for tensor in network.state_dict().values():
                tensor.sum()

    for job, touch in (("load", False), ("load and read", True)):
        report(
            f"{job} {file.stat().st_size // 1_000_000} MB",
            partial(load, load_tensors, touch),
            partial(load, load_file, touch),
            runs,
        )


def mixed_tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """A network's mix: for every large matrix a few vectors and a counter."""
    matrices = TENSORS // 5
    rows = megabytes * 1_000_000 // (matrices * 4 * 1024)
    tensors: dict[str, torch.Tensor] = {}
    for i in range(matrices):
        tensors[f"blocks.{i}.weight"] = torch.randn(rows, 1024)
        for name in ("bias", "norm.weight", "norm.bias"):
            tensors[f"blocks.{i}.{name}"] = torch.randn(1024)
        tensors[f"blocks.{i}.norm.num_batches_tracked"] = torch.tensor(i)
    return tensors


def report(
    job: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    runs: int,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    measured: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
    for _ in range(runs + 1):
        for who, act in (("theirs", theirs), ("ours", ours)):
            prepare()
            measured[who].append(clocked(act))
    medians = {
        who: [statistics.median(column) for column in zip(*times[1:], strict=True)]  # 1st: warm-up
        for who, times in measured.items()
    }
    for who, (cpu, wall) in medians.items():
        print(f"{job:24} {who:6} {cpu:8.3f} {wall:8.3f}")
    cpu, wall = (a / b for a, b in zip(medians["ours"], medians["theirs"], strict=True))
    print(f"{job:24} {'ratio':6} {cpu:8.2f} {wall:8.2f}")


def clocked(act: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds (user + system, all threads) and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    act()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
