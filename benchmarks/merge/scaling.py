"""How the merge phase scales with threads: the engine alone, without start-up, layout and sync.

    python benchmarks/merge/scaling.py --folder FOLDER

FOLDER has (or gets) the models of `speed.py`. Each run is a process of its own, one and two threads
take turns, and what is counted is the wall clock and the CPU time of `zoo.fusion.stream.run`:
medians, and the median of the ratios of one turn. A merge of a small model goes first and loads the
compiled loops; `--plain` does without them. --out: where the results go, by default where temporary
files do; a disk that writes back what other runs wrote makes figures of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from speed import make_models

METHODS: dict[str, dict[str, float]] = {
    "ties": {"density": 0.2}, "sce": {"select_topk": 0.2}, "dare_ties": {"density": 0.3},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05}, "della": {"density": 0.5, "epsilon": 0.1}}


def measure(method: str, threads: int, folder: Path, out: Path) -> dict[str, float]:
    """Seconds of the engine in one merge."""
    import torch

    import zoo
    from zoo.fusion import compiled
    from zoo.merge_files import merging
    from zoo.tensors import save_tensors

    compiled.WORTH = 0
    small = [out.with_name(f"small{number}.safetensors") for number in range(4)]
    for file in small:
        save_tensors({"a": torch.randn(300, 300)}, file)
    zoo.merge(small[1:], method, base=small[0], out=out, **METHODS[method])

    told = {}
    run = merging.run

    def timed(*given: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = run(*given, **named)
        told.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)
        return result

    merging.run = timed
    zoo.merge([folder / f"model{number}" for number in (1, 2, 3)], method, base=folder / "base",
              out=out, threads=threads, **METHODS[method])
    return told


def asked(method: str, threads: int, folder: Path, out: Path, plain: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", method,
               str(threads), str(out)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
        "ZOO_PROGRESS": "0", "ZOO_COMPILED": "0" if plain else "1"}).stdout
    return dict(json.loads(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        method, threads, out = given.measure
        print(json.dumps(measure(method, int(threads), given.folder, Path(out))))
        return
    if not (given.folder / "base").exists():
        make_models(given.folder, 1.0, 0)
    for name in ("base", "model1", "model2", "model3"):
        (given.folder / name / "model.safetensors").read_bytes()  # into the page cache
    print("| method | wall s, 1 thread | 2 threads | CPU s, 1 thread | 2 threads | wall ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(dir=given.out) as temporary:
        for method in given.only.split(","):
            turns = [[asked(method, threads, given.folder, Path(temporary) / "out",
                            given.plain) for threads in (1, 2)]
                     for _ in range(given.runs)]
            cells = [f"{statistics.median(turn[which][key] for turn in turns):.2f}"
                     for key in ("wall", "cpu") for which in (0, 1)]
            ratio = statistics.median(turn[0]["wall"] / turn[1]["wall"] for turn in turns)
            print(f"| {method} | " + " | ".join([*cells, f"{ratio:.2f} ×"]) + " |", flush=True)


if __name__ == "__main__":
    main()
