"""Push and pull beside the bare huggingface_hub client, against a Hub on loopback.

    OMP_NUM_THREADS=1 python benchmarks/hub.py
    OMP_NUM_THREADS=1 python benchmarks/hub.py --jobs pull --rate 300
    OMP_NUM_THREADS=1 python benchmarks/hub.py --jobs members --latency 0.3

push, pull: a model of --mb megabytes, with no cache. dry run: of a folder that the Hub has, its
hashes unknown and known. members: eight of 20 MB, by a Hub that answers after --latency seconds,
fetched and fused by one `zoo.fuse`, or loaded one after another first. The Hub runs in this
process, each measurement in one of its own, whose imports do not count; ours and theirs take turns.
CPU seconds are those of the client, and beside them those of the Hub. --rate: megabytes a second
that the Hub sends; without it, as fast as it goes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
MEMBERS = [f"hf-hub:me/m{number}" for number in range(8)]
NETWORK = "timm/resnet10t"  # 22 MB


def main() -> None:
    parser = argparse.ArgumentParser(description="push and pull against the bare client")
    parser.add_argument("--mb", type=int, default=1000, help="size of the model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.3, help="seconds, for members")
    parser.add_argument("--rate", type=float, help="MB a second that the Hub sends")
    parser.add_argument("--jobs", nargs="*", default=["push", "dry-run", "pull", "members"])
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, Path(options.folder))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        run(Path(place), options)


def run(place: Path, options: argparse.Namespace) -> None:
    from hub import Hub

    with Hub() as hub:
        hub.store.part = 64 << 20
        hub.rate = options.rate and options.rate * 1e6
        token = hub.token("me")
        if {"push", "dry-run", "pull"} & set(options.jobs):
            large_model(place / "model", options.mb)

        def ask(job: str, number: int) -> dict[str, float]:
            return asked(job, place, number, hub.url, token)

        def forget() -> None:
            hub.store.repositories.clear()
            hub.store.large.clear()
            os.sync()

        if "push" in options.jobs:
            versus("push", options.runs, ask, "push-bare", "push-ours", forget)
        forget()
        if {"dry-run", "pull"} & set(options.jobs):
            ask("push-ours", 0)  # so that it is there as zoo pushes it
        if "dry-run" in options.jobs:
            versus("dry run, 1st and 2nd", options.runs, ask, "dry-run-again", "dry-run", os.sync)
        if "pull" in options.jobs:
            versus("pull", options.runs, ask, "pull-bare", "pull-ours", os.sync)
        forget()
        if "members" in options.jobs:
            import zoo

            for number, name in enumerate(MEMBERS):
                folder = place / f"m{number}"
                zoo.save(zoo.backbone(NETWORK, seed=number, device="cpu"), folder)
                hub.store.seed(name.removeprefix("hf-hub:"), folder)
            hub.latency = options.latency
            for what in ("fetch", "fuse"):
                versus(f"{what} 8 members", options.runs, ask, f"{what}-apart", f"{what}-together",
                       os.sync)


def large_model(folder: Path, megabytes: int) -> None:
    """A folder that is pushed and pulled like any other; nothing builds its network."""
    import zoo
    from zoo.tensors import save_tensors

    zoo.save(zoo.backbone("mnist_cnn", seed=1, device="cpu"), folder)
    tensors = {str(n): torch.randn(megabytes * 10_000) for n in range(25)}
    hashes = save_tensors(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["zoo"]["made_with"]["sha256"] = hashes
    (folder / "config.json").write_text(json.dumps(config))


def versus(title: str, runs: int, ask: Callable[[str, int], dict[str, float]], theirs: str,
           ours: str, prepare: Callable[[], None]) -> None:
    """Turn and turn about; each figure is the median, each ratio that of one turn."""
    turns = []
    for number in range(runs):
        turn = {}
        for job in (theirs, ours) if number % 2 else (ours, theirs):
            prepare()
            turn[job] = ask(job, number)
        turns.append(turn)
    for job in (theirs, ours):
        wall, cpu, hub = (statistics.median(turn[job][key] for turn in turns)
                          for key in ("wall", "cpu", "hub"))
        print(f"{title:22} {job:16} wall {wall:7.2f} s   CPU {cpu:7.2f} s   Hub {hub:7.2f} s",
              flush=True)
    for key in ("wall", "cpu"):
        ratios = sorted(turn[ours][key] / turn[theirs][key] for turn in turns)
        print(f"{title:22} {ours} / {theirs}, {key}: "
              + ", ".join(f"{ratio:.3f}" for ratio in ratios), flush=True)


def asked(job: str, place: Path, number: int, url: str, token: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=place) as home:
        told = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        told |= {"HF_ENDPOINT": url, "HF_HOME": home, "HF_TOKEN": token, "ZOO_CACHE": f"{home}/zoo",
                 "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        before = spent()
        done = subprocess.run([sys.executable, __file__, "--measure", job, "--folder", str(place)],
                              env=told, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return {**found, "hub": spent() - before}


def measure(job: str, place: Path) -> None:
    import huggingface_hub
    from huggingface_hub import HfApi

    import zoo
    import zoo.assembly
    import zoo.hub
    from zoo.names import parse
    from zoo.store.fetching import hub_folders

    api, folder = HfApi(), place / "model"

    def bare() -> None:
        api.create_repo("me/large")
        api.upload_folder(repo_id="me/large", folder_path=folder)

    def apart() -> None:
        zoo.fuse([zoo.load(name, device="cpu") for name in MEMBERS], "mean")

    jobs: dict[str, Callable[[], object]] = {
        "push-bare": bare,
        "push-ours": lambda: zoo.push(folder, "me/large"),
        "dry-run": lambda: zoo.push(folder, "me/large", dry_run=True),
        "pull-bare": lambda: huggingface_hub.snapshot_download("me/large"),
        "pull-ours": lambda: zoo.pull("me/large"),
        "fetch-apart": lambda: [zoo.pull(name) for name in MEMBERS],
        "fetch-together": lambda: hub_folders([parse(name) for name in MEMBERS]),
        "fuse-apart": apart,
        "fuse-together": lambda: zoo.fuse(MEMBERS, "mean", device="cpu"),
    }
    if job == "dry-run-again":
        zoo.push(folder, "me/large", dry_run=True)
        job = "dry-run"
    wall, cpu = time.perf_counter(), spent()
    jobs[job]()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": spent() - cpu}))


def spent() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
