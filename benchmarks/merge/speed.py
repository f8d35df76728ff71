"""Whole-process cost of merging files, side by side with mergekit from PyPI.

    python benchmarks/merge/speed.py --mergekit path/to/its/venv/bin/mergekit-yaml

makes a base and three models of a Llama shape, runs both tools in turn, and prints CPU seconds
(user and system), wall clock, and the largest anonymous memory of each, medians of the runs, page
cache warm. `--only ties,linear` picks methods, `--scale 2` doubles the models, `--many 4000` makes
models of that many small tensors, `--threads 1,2` shows how the merge scales. The method `floor`
only imports torch, reads the three models and writes one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# mergekit's method → (its parameters, our strategy, our options)
METHODS: dict[str, tuple[dict[str, object], list[str]]] = {
    "linear": ({}, ["average"]),
    "slerp": ({"t": 0.5}, ["slerp", "--t", "0.5", "--convention", "mergekit"]),
    "task_arithmetic": ({"lambda": 0.5}, ["task_arithmetic", "--scale", "0.5"]),
    "model_stock": ({}, ["model_stock", "--convention", "mergekit"]),
    "multislerp": ({}, ["multislerp"]),
    "karcher": ({}, ["karcher"]),
    "sce": ({"select_topk": 0.2}, ["sce", "--select-topk", "0.2"]),
    "dare_ties": ({"density": 0.3}, ["dare_ties", "--density", "0.3"]),
    "ties": ({"density": 0.2}, ["ties", "--density", "0.2"]),
    "ties per tensor": ({"density": 0.2}, ["ties", "--density", "0.2", "--convention", "mergekit"]),
    "breadcrumbs": ({"density": 0.8, "gamma": 0.05},
                    ["breadcrumbs", "--density", "0.8", "--gamma", "0.05"]),
    "della": ({"density": 0.5, "epsilon": 0.1}, ["della", "--density", "0.5", "--epsilon", "0.1"]),
    "della binned": ({"density": 0.5, "epsilon": 0.1},
                     ["della", "--density", "0.5", "--epsilon", "0.1", "--ranks", "binned"]),
}
FLOOR = """
import os, sys, torch
*inputs, out = sys.argv[1:]
buffer = bytearray(1 << 24)
with open(out, "wb") as written:
    for number, path in enumerate(inputs):
        with open(path, "rb") as read:
            while count := read.readinto(buffer):
                if number == 0:
                    written.write(memoryview(buffer)[:count])
    os.fsync(written.fileno())
"""
WITHOUT_BASE = ("linear", "slerp", "karcher", "multislerp")


def make_models(folder: Path, scale: float, many: int) -> list[Path]:
    """A base and three models that differ from it a little, as folders of one safetensors file."""
    layers, hidden, inner, vocabulary = round(12 * scale), 1024, 2816, 32_000
    if many:  # nine tensors a layer
        layers, hidden, inner, vocabulary = many // 9, 64, 64, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for n in range(layers):
        at = f"model.layers.{n}"
        shapes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}.mlp.gate_proj.weight": (inner, hidden),
                   f"{at}.mlp.up_proj.weight": (inner, hidden),
                   f"{at}.mlp.down_proj.weight": (hidden, inner),
                   f"{at}.input_layernorm.weight": (hidden,),
                   f"{at}.post_attention_layernorm.weight": (hidden,)}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
              "intermediate_size": inner, "num_hidden_layers": layers,
              "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": vocabulary,
              "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "float32"}
    generator = torch.Generator().manual_seed(0)
    base = {key: torch.randn(shape, generator=generator) * 0.02 for key, shape in shapes.items()}
    places = []
    for number in range(4):
        place = folder / ("base" if number == 0 else f"model{number}")
        place.mkdir(parents=True)
        state = base if number == 0 else {
            key: tensor + torch.randn(tensor.shape, generator=generator) * 1e-3
            for key, tensor in base.items()}
        save_file(state, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
        places.append(place)
    return places


def measured(command: list[str], threads: int) -> dict[str, float]:
    """CPU seconds, wall clock and peak anonymous megabytes of one command."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
                   "TRANSFORMERS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "ZOO_PROGRESS": "0"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    assert process.stdout
    text = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "memory": peak[0]}


def _watch(pid: int, peak: list[float]) -> None:
    while True:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            return
        for line in lines:
            if line.startswith("RssAnon"):
                peak[0] = max(peak[0], int(line.split()[1]) / 1024)
        time.sleep(0.02)


def recipe(method: str, places: list[Path], file: Path) -> Path:
    """mergekit's YAML for a method."""
    parameters, _ = METHODS[method]
    members = places[1:3] if method == "slerp" else places[1:]
    told: dict[str, Any] = {
        "merge_method": method.split()[0], "dtype": "float32",
        "models": [{"model": str(place), "parameters": {"weight": 1.0}} for place in members]}
    own = {name: value for name, value in parameters.items()
           if name in ("density", "epsilon", "gamma")}
    for model in told["models"]:
        model["parameters"] |= own
    told["parameters"] = {name: value for name, value in parameters.items() if name not in own}
    if method == "slerp":
        told["base_model"] = str(places[1])
    elif method not in WITHOUT_BASE:
        told["base_model"] = str(places[0])
    file.write_text(json.dumps(told))  # JSON is YAML
    return file


def ours(method: str, places: list[Path], out: Path, threads: int) -> list[str]:
    if method == "floor":
        files = [str(place / "model.safetensors") for place in places[1:]]
        return [sys.executable, "-c", FLOOR, *files, str(out.with_name("floor"))]
    members = places[1:3] if method == "slerp" else places[1:]
    base = [] if method in WITHOUT_BASE else ["--base", str(places[0])]
    strategy, *options = METHODS[method][1]
    return [str(Path(sys.executable).with_name("zoo")), "merge", *map(str, members), "--with",
            strategy, *base, *options, "--threads", str(threads), "-o", str(out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="its mergekit-yaml command")
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--many", type=int, default=0)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--folder", help="for the models; kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary)
        names = ["base", "model1", "model2", "model3"]
        places = ([folder / name for name in names] if (folder / "base").exists()
                  else make_models(folder, given.scale, given.many))
        for place in places:
            (place / "model.safetensors").read_bytes()  # into the page cache
        print("| method | threads | CPU s | wall s | anonymous MB | mergekit CPU s | wall s "
              "| anonymous MB | CPU ratio | wall ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for method in given.only.split(","):
            for threads in map(int, given.threads.split(",")):
                row(method, threads, places, Path(temporary), given.mergekit, given.runs)


def row(
    method: str, threads: int, places: list[Path], temporary: Path, mergekit: str | None, runs: int
) -> None:
    mine, theirs = [], []
    for _ in range(runs):
        mine.append(measured(ours(method, places, temporary / "ours", threads), threads))
        if mergekit and method != "floor":
            theirs.append(measured(
                [mergekit, str(recipe(method, places, temporary / "m.yaml")),
                 str(temporary / "theirs"), "--no-copy-tokenizer", "--trust-remote-code"],
                threads))
    cells = [f"{method}", f"{threads}", *_medians(mine)]
    if theirs:
        ratios = [statistics.median(run[what] for run in theirs)
                  / statistics.median(run[what] for run in mine) for what in ("cpu", "wall")]
        cells += [*_medians(theirs), *(f"{ratio:.1f} ×" for ratio in ratios)]
    print("| " + " | ".join(cells) + " |", flush=True)


def _medians(runs: list[dict[str, float]]) -> list[str]:
    return [f"{statistics.median(run[what] for run in runs):.{places}f}"
            for what, places in (("cpu", 2), ("wall", 2), ("memory", 0))]


if __name__ == "__main__":
    main()
