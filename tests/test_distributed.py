"""Two real processes on this machine's CPU, over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

_SCRIPT = """
import sys, torch, zoo
from accelerate import PartialState
from zoo.datasets import ImageData
from zoo.training.streams import Stream

rank = PartialState(cpu=True).process_index
torch.set_num_threads(1)
torch.manual_seed(100 + rank)
seen = []
epoch = Stream.epoch
def watched(self, number, phase):
    for batch in epoch(self, number, phase):
        if self.shuffled:
            seen.append(batch.labels.tolist())
        yield batch
Stream.epoch = watched

n = 100
generator = torch.Generator().manual_seed(0)
labels = torch.arange(n) % 4
pixels = torch.rand(n, 3, 32, 32, generator=generator) * 0.7
pixels[torch.arange(n), labels % 3] += 0.3
data = ImageData(pixels, torch.arange(n) % 4, "abcd")
every = ImageData(pixels, torch.arange(n), [str(i) for i in range(n)])

def net(data, name="timm/test_resnet", **options):
    return zoo.backbone(name, classes=data.classes, image_size=32, device="cpu", seed=0, **options)

model = net(data)
result = zoo.transfer(model, data, "finetune", val=0.2, epochs=3, batch_size=10, norms="train",
                      patience=2, checkpoint=sys.argv[2])
shards = net(every, "mnist_cnn")
seen.clear()
zoo.transfer(shards, every, "finetune", epochs=1, batch_size=11)
shards = list(seen)
attacked = net(data)
robust = zoo.transfer(attacked, data, "fgsm_at", epochs=2, batch_size=10, eps=0.05)
try:
    zoo.transfer(net(data, "mnist_cnn"), data, batch_size=64, val=0.5)
    error = ""
except zoo.ZooError as problem:
    error = str(problem)
probe = net(data, "mnist_cnn")
zoo.transfer(probe, data, "linear_probe", epochs=2, batch_size=10)
inner = zoo.fuse([net(data, "mnist_cnn"), net(data)], "aff", hidden=16)
mapped = zoo.fuse([inner, net(data)], "concat")
zoo.transfer(mapped, data, "lp_ft", epochs=2, batch_size=10)
torch.save({
    "model": model.state_dict(), "attacked": attacked.state_dict(), "probe": probe.state_dict(),
    "mapped": mapped.state_dict(),
    "history": [{k: v for k, v in row.items() if k in ("loss", "val_nll", "val_accuracy")}
                for row in result.history],
    "robust": [row["loss"] for row in robust.history], "shards": shards, "error": error,
}, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "train.py"
    script.write_text(_SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    command = [sys.executable, str(script), str(folder), str(folder / "kept")]
    running = [subprocess.Popen(command, env={**environment, "RANK": str(rank),
                                              "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0]
    assert not (folder / "kept").exists()
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["model", "attacked", "probe", "mapped"])
def test_both_processes_end_with_the_same_model(ranks: list[dict[str, Any]], name: str) -> None:
    a, b = (rank[name] for rank in ranks)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_they_agree_on_the_history_and_it_learns(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["history"] == ranks[1]["history"]
    assert ranks[0]["robust"] == ranks[1]["robust"]
    losses = [row["loss"] for row in ranks[0]["history"]]
    assert losses[-1] < losses[0]


def test_shards_are_disjoint_and_equally_long(ranks: list[dict[str, Any]]) -> None:
    # 100 images are 9 batches of 11 and a last one of 1, which is left out for its batch norm; 8
    # are shared out evenly.
    assert [len(rank["shards"]) for rank in ranks] == [4, 4]
    images = [image for rank in ranks for batch in rank["shards"] for image in batch]
    assert len(images) == len(set(images)) == 88


def test_fewer_batches_than_processes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["error"] == ("50 images are 1 batch(es) of 64, fewer than the 2 processes; "
                                 "make batch_size smaller")
