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

# Run by torchrun's variables alone, and by one process with the same steps.
_TAUGHT = """
import os, sys, torch, zoo
from zoo.datasets import ImageData

world, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
torch.set_num_threads(1)
n = 48
labels = torch.arange(n) % 3
pixels = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8
pixels[torch.arange(n), labels] += 0.2
data = ImageData(pixels, labels, "abc")

def net(seed=0, **options):
    return zoo.backbone("mnist_cnn", classes=tuple("abc"), image_size=8, device="cpu", seed=seed,
                        **options)

def pair(name="concat"):
    return zoo.fuse([net(1), net(2, width=2)], name)

found = {}
def train(name, model, method, images=data, **options):
    result = zoo.transfer(model, images, method, epochs=2, batch_size=16 // world, lr=0.01,
                          optimizer="sgd", **options)
    found[name] = model.state_dict(), [row["loss"] for row in result.history]

teachers = [net(1), net(2, width=2)]
train("distill", net(), "distill", teachers=teachers)
train("confidence", net(), "distill", teachers=teachers, weights="confidence")
train("unlabelled", net(), "distill", data.without_labels(), teachers=teachers, alpha=1.0)
train("augmented", net(), "distill", teachers=teachers, augment="basic")
train("self_distill", net(), "self_distill", teachers=[pair("mean")])
train("feature_distill", net(), "feature_distill", teachers=teachers, logits=0.5)
train("features alone", pair(), "feature_distill", teachers=teachers, alpha=1.0)
train("hint", net(), "finetune", teachers=teachers)
for name in ("concat", "gated", "moe", "attention"):
    train(name, pair(name), "linear_probe")
train("views", pair(), "linear_probe", augment="basic", views=2)
chosen = zoo.fuse([net(1), net(2)], "auto", data=data, trials=2, head_epochs=2,
                  strategies=["mean", "concat"], errors=0.0)
dropped = net(drop_rate=0.5)
seen = []
dropped.members[0].net.drop.register_forward_hook(
    lambda module, given, out: seen.append(out == 0) if module.training else None)
zoo.transfer(dropped, data, epochs=1, batch_size=16 // world)
try:
    zoo.fuse([net(1), net(2)], "auto", data=data, budget=1.0, strategies="mean")
    error = ""
except zoo.ZooError as problem:
    error = str(problem)
torch.save({"found": found, "auto": (chosen.recipe["auto"]["chosen"], chosen.state_dict()),
            "dropped": seen[0], "error": error}, f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process, and each of two, ends with."""
    folder = tmp_path_factory.mktemp("taught")
    script = folder / "train.py"
    script.write_text(_TAUGHT)
    (folder / "one").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ZOO_PROGRESS": "1"}
    command = [sys.executable, str(script)]
    subprocess.run([*command, str(folder / "one")], env=environment, check=True, timeout=240,
                   capture_output=True)
    printed = _two([*command, str(folder)], environment)
    assert "zoo/distill 1/2: " in printed[0]
    assert "images in" not in printed[1]
    return [torch.load(file, weights_only=True) for file in (
        folder / "one" / "0.pt", folder / "0.pt", folder / "1.pt")]


def _two(command: list[str], environment: dict[str, str]) -> list[str]:
    """Run as two processes, as torchrun would start them; what each says on stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**environment, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        printed = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], printed
    return printed


def test_two_processes_learn_what_one_learns(taught: list[dict[str, Any]]) -> None:
    one, *two = (run["found"] for run in taught)
    assert len(one) == 13
    for name, (state, losses) in one.items():
        for rank in two:
            assert rank[name][1] == pytest.approx(losses, rel=1e-4), name
            for key, tensor in state.items():
                torch.testing.assert_close(rank[name][0][key], tensor, rtol=1e-4, atol=1e-5,
                                           msg=f"{name}: {key}")
                assert torch.equal(two[0][name][0][key], two[1][name][0][key])


def test_all_processes_choose_the_same(taught: list[dict[str, Any]]) -> None:
    (chosen, state), (other, theirs) = (run["auto"] for run in taught[1:])
    assert chosen == other == taught[0]["auto"][0]
    assert all(torch.equal(state[key], theirs[key]) for key in state)
    assert [bool(run["error"]) for run in taught] == [False, True, True]
    assert "several processes would try as much as each has time for" in taught[1]["error"]


TRAIN = """import sys, torch, zoo
if "--before" in sys.argv:
    import accelerate
    accelerate.PartialState()
try:
    zoo.transfer(zoo.backbone("mnist_cnn", num_classes=2, image_size=8, device="cpu"),
                 torch.utils.data.TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4) % 2))
except zoo.errors.TrainingError as error:
    print(error, file=sys.stderr)
"""


def test_a_process_that_accelerate_took_for_one_by_itself_is_told() -> None:
    told = _two([sys.executable, "-c", TRAIN, "--before"],
                {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    for each in told:
        assert "2 processes were started, and Accelerate took this one for one by itself" in each


def test_what_a_cluster_sets_for_every_container_starts_nothing() -> None:
    kept = {key: value for key, value in os.environ.items() if "RANK" not in key}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True, timeout=120, check=False,
        env={**kept, "WORLD_SIZE": "2", "RANK": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert "started" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_each_process_has_its_own_noise(taught: list[dict[str, Any]]) -> None:
    assert not torch.equal(taught[1]["dropped"], taught[2]["dropped"])


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
