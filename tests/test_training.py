"""What every transfer has in common: settings, the loop, failures, interruption and resumption."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import zoo
from zoo.datasets import ImageData, index_batches
from zoo.errors import DataError, FusionError, OptionError, TrainingError
from zoo.model import Model
from zoo.training.loop import Loop
from zoo.transfers.objective import Objective

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


def net(seed: int = 0, **options: Any) -> Model:
    return zoo.backbone("mnist_cnn", classes=CLASSES, image_size=8, device="cpu", seed=seed,
                        **options)


def with_norms(seed: int = 0) -> Model:
    return zoo.backbone("timm/test_resnet", classes=CLASSES, image_size=32, device="cpu", seed=seed)


def images(n: int = 48, side: int = 8, seed: int = 0) -> ImageData:
    """Three classes that differ in one colour each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    pixels = torch.rand(n, 3, side, side, generator=generator) * 0.7
    pixels[torch.arange(n), labels] += 0.3
    return ImageData(pixels, labels, CLASSES)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_is_the_plain_loop() -> None:
    model, data = net(), images(40)
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
    by_hand.train()
    pixels, labels = data.batch(range(40))
    losses = []
    for epoch in range(2):
        total = 0.0
        for batch in index_batches(40, 16, shuffle=True, seed=3, epoch=epoch):
            loss = functional.cross_entropy(by_hand(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / 40)
    result = zoo.transfer(model, data, epochs=2, lr=1e-2, batch_size=16, seed=3)
    assert result.model is model
    assert [row["loss"] for row in result.history] == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in
               zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True))


def test_history_and_recipe() -> None:
    model = net()
    result = zoo.transfer(model, images(), "finetune", val=0.25, epochs=2, lr=0.01,
                          schedule="cosine", augment={"scale": [0.9, 1.0]}, activation="tanh")
    assert result.method == "zoo/finetune"
    assert result.seconds > 0
    assert [(row["phase"], row["epoch"]) for row in result.history] == [(0, 0), (0, 1)]
    assert result.history[0].keys() == {"phase", "epoch", "loss", "lr", "seconds",
                                        "images_per_second", "val_accuracy", "val_nll"}
    assert [row["lr"] for row in result.history] == pytest.approx([0.01, 0.005])
    (told,) = json.loads(json.dumps(model.recipe))["transfers"]
    assert told["method"] == "zoo/finetune"
    assert told["settings"] == {"epochs": 2, "lr": 0.01, "seed": 0, "schedule": "cosine",
                                "augment": {"scale": [0.9, 1.0]}}
    assert told["images"] == 36
    assert told["activation"] == "tanh"
    zoo.transfer(model, images(), "linear_probe", epochs=1)
    assert [each["method"] for each in model.recipe["transfers"]] == [
        "zoo/finetune", "zoo/linear_probe"]


@pytest.mark.parametrize("settings", [
    {"optimizer": "adamw", "weight_decay": 0.1}, {"optimizer": "lookahead_sgd"},
    {"schedule": "step", "epochs": 3}, {"schedule": "multistep", "epochs": 4},
    {"schedule": "poly", "warmup_epochs": 1}, {"loss": "bce", "label_smoothing": 0.1},
    {"clip_grad": 0.1}, {"precision": "bfloat16"}, {"augment": "basic"}, {"activation": "tanh"},
], ids=str)
def test_every_setting_changes_the_result(settings: dict[str, Any]) -> None:
    plain, other = net(), net()
    zoo.transfer(plain, images(), epochs=2)
    result = zoo.transfer(other, images(), **{"epochs": 2, **settings})
    assert not same(state(plain), state(other))
    assert result.history[-1]["loss"] < 2
    assert all(torch.isfinite(tensor).all() for tensor in other.state_dict().values())
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_schedules_reach_their_epochs() -> None:
    lrs = [row["lr"] for row in zoo.transfer(
        net(), images(), epochs=4, schedule="multistep", lr=0.1, batch_size=8).history]
    assert lrs == pytest.approx([0.1, 0.1, 0.01, 0.001])
    lrs = [row["lr"] for row in zoo.transfer(
        net(), images(), epochs=3, schedule="cosine", warmup_epochs=1, lr=0.1).history]
    assert lrs[0] == pytest.approx(0.01)
    assert lrs[1] > lrs[0]


def test_the_seed_decides() -> None:
    states = []
    for seed in (1, 1, 2):
        model = net(drop_rate=0.5)
        zoo.transfer(model, images(), epochs=2, seed=seed, augment="basic")
        states.append(state(model))
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_nothing_else_is_touched() -> None:
    model, teacher = net(), net(1)
    teacher.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    weights = state(teacher)
    zoo.transfer(model, images(), teachers=[teacher], epochs=1, augment="rand-m9-n2",
                 val=images(9, seed=1))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [p.requires_grad for p in model.parameters()] == [
        p is not first for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert teacher.training
    assert same(state(teacher), weights)


def test_other_classes_get_a_new_head() -> None:
    model = net()
    data = ImageData(images().batch(range(48))[0], [i % 4 for i in range(48)], "wxyz")
    result = zoo.transfer(model, data, "linear_probe", epochs=1)
    assert model.classes == tuple("wxyz")
    assert result.notes == [
        "the head was replaced: the data's 4 classes are not the model's 3"]
    assert model.recipe["transfers"][0]["images"] == 48


def test_the_same_classes_in_another_order_keep_the_head() -> None:
    model, data = net(), images()
    assert data.labels is not None
    turned = ImageData(data.batch(range(48))[0], 2 - data.labels, CLASSES[::-1])
    other = copy.deepcopy(model)
    assert zoo.transfer(model, turned, epochs=1).notes == []
    zoo.transfer(other, data, epochs=1)
    assert model.classes == CLASSES
    assert same(state(model), state(other))


def test_the_best_epoch_is_kept() -> None:
    model = net()
    result = zoo.transfer(model, images(), val=images(30, seed=5), epochs=6, lr=0.05)
    best = max(result.history, key=lambda row: (row["val_accuracy"], -row["val_nll"]))
    measured = zoo.evaluate(model, images(30, seed=5))
    assert measured.accuracy == best["val_accuracy"]
    assert measured.nll == pytest.approx(best["val_nll"], rel=1e-4)


def test_patience_stops() -> None:
    model = net()
    data = images()
    noise = ImageData(torch.rand(12, 3, 8, 8), [0] * 12, CLASSES)
    result = zoo.transfer(model, data, val=noise, epochs=30, lr=0.02, patience=2)
    epochs = len(result.history)
    assert epochs < 30
    assert result.notes == [f"stopped after epoch {epochs}: no improvement for 2 epochs"]
    best = max(result.history, key=lambda row: (row["val_accuracy"], -row["val_nll"]))
    assert best["epoch"] == epochs - 3


class _Interrupting(Objective):
    """Fails in the middle of an epoch."""

    def __init__(self, model: Model, criterion: Any, *, at: int, error: BaseException) -> None:
        super().__init__(model, criterion)
        self.left = at
        self.error = error

    def loss(self, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().loss(batch)


@pytest.fixture
def failing(install: Any) -> None:
    install("failing", '''
import zoo
from tests_failing import _Interrupting

@zoo.hookimpl
def zoo_transfers():
    return [zoo.TransferSpec(name="later", build="zoo_failing:build")]

def build(model, *, criterion, at: int, interrupt: bool = False):
    error = KeyboardInterrupt() if interrupt else MemoryError("no room")
    return _Interrupting(model, criterion, at=at, error=error)
''')
    sys.modules["tests_failing"] = sys.modules[__name__]


@pytest.mark.parametrize(("interrupt", "error"), [(False, MemoryError), (True, KeyboardInterrupt)])
def test_a_failure_leaves_the_last_whole_epoch(
    failing: None, interrupt: bool, error: type[BaseException]
) -> None:
    model, other = with_norms(), with_norms()
    with pytest.raises(error):
        zoo.transfer(model, images(side=32), "failing/later", epochs=3, batch_size=16,
                     at=5, interrupt=interrupt)
    zoo.transfer(other, images(side=32), epochs=1, batch_size=16)
    assert same(state(model), state(other))
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert "transfers" not in model.recipe


def test_a_failure_in_the_first_epoch_undoes_everything(failing: None) -> None:
    model = net()
    before, head = state(model), next(model.each_member()).net.get_classifier()  # type: ignore[operator]
    data = ImageData(images().batch(range(48))[0], [i % 2 for i in range(48)], ("x", "y"))
    with pytest.raises(MemoryError):
        zoo.transfer(model, data, "failing/later", batch_size=16, at=2, activation="tanh")
    assert model.classes == CLASSES
    assert next(model.each_member()).net.get_classifier() is head  # type: ignore[operator]
    assert "Tanh" not in str(model)
    assert next(model.each_member()).blueprint == next(net().each_member()).blueprint
    assert same(state(model), before)


def test_a_fusion_of_outputs_keeps_its_classes_when_they_do_not_fit() -> None:
    model = zoo.fuse([net(0), net(1)], "mean")
    data = ImageData(images().batch(range(48))[0], [i % 2 for i in range(48)], ("x", "y"))
    with pytest.raises(FusionError):
        zoo.transfer(model, data)
    assert model.classes == CLASSES


def test_a_loss_that_is_not_finite() -> None:
    model = net()
    before = state(model)
    with pytest.raises(TrainingError, match=r"(the loss is (nan|inf)|a weight is not finite) in "
                       r"epoch 1; the model has the weights of the epoch before. A learning rate "
                       r"below 1e\+25 or clip_grad=1 may help"):
        zoo.transfer(model, images(), optimizer="momentum", lr=1e25, epochs=2, batch_size=16)
    assert same(state(model), before)


def test_a_weight_that_is_not_finite() -> None:
    model = net()
    with pytest.raises(TrainingError, match="a weight is not finite in epoch 1"):
        zoo.transfer(model, images(), optimizer="momentum", lr=1e38, epochs=1, batch_size=48,
                     weight_decay=1000)


def norms_of(model: Model) -> list[torch.Tensor]:
    return [b.clone() for name, b in model.named_buffers() if "running" in name or "num_b" in name]


@pytest.mark.parametrize(("method", "options", "moved"), [
    ("finetune", {"norms": "train"}, True), ("finetune", {"norms": "frozen"}, False),
    ("finetune", {}, True), ("linear_probe", {}, False),
])
def test_batch_norm(method: str, options: dict[str, Any], moved: bool) -> None:
    model = with_norms()
    before = norms_of(model)
    zoo.transfer(model, images(32, 32), method, epochs=1, **options)
    unchanged = all(torch.equal(a, b) for a, b in zip(before, norms_of(model), strict=True))
    assert unchanged is not moved
    assert next(model.each_member()).norms == ("trained" if moved else "frozen")


def test_batch_norm_of_pretrained_members_is_frozen_by_default() -> None:
    pretrained, fresh = with_norms(0), with_norms(1)
    next(pretrained.each_member()).source = {"tag": "a1_in1k"}
    model = zoo.fuse([pretrained, fresh], "concat")
    zoo.transfer(model, images(32, 32), epochs=1)
    assert [member.norms for member in model.each_member()] == ["frozen", "trained"]
    nested = zoo.fuse([zoo.fuse([fresh, with_norms(2)], "concat"), net()], "concat")
    next(nested.each_member()).source = {}
    zoo.transfer(nested, images(32, 32), epochs=1)
    inner = next(nested.each_member()).net
    assert isinstance(inner, Model)
    assert [member.norms for member in inner.each_member()] == ["trained", "trained"]
    assert [member.norms for member in nested.each_member()][1] == "none"


_RUN = """
import sys, time, torch, zoo
sys.path.insert(0, {tests!r})
from test_training import images, net, state
import zoo.training.loop
torch.set_num_threads(1)
model = net(drop_rate=0.3)
if sys.argv[1] == "slow":
    epoch = zoo.training.loop.Loop._epoch
    def slow(self, number):
        time.sleep(0.2)
        return epoch(self, number)
    zoo.training.loop.Loop._epoch = slow
result = zoo.transfer(model, images(), "lp_ft", val=0.25, epochs=12, schedule="cosine", seed=7,
                      augment="basic", checkpoint={folder!r})
torch.save([state(model), [(r["phase"], r["loss"], r["val_nll"]) for r in result.history]],
           sys.argv[2])
"""


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    folder = tmp_path / "kept"
    script.write_text(_RUN.format(tests=str(Path(__file__).parent), folder=str(folder)))
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen([*command, "slow", str(tmp_path / "never")], env=environment)
    file = folder / "transfer.ckpt"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and running.poll() is None:
        # Into the second phase: the checkpoint says so only from the inside.
        if file.exists() and torch.load(file, weights_only=True)["phase"] == 1:
            break
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    done = torch.load(file, weights_only=True)["history"]
    assert 6 < len(done) < 12
    subprocess.run([*command, "fast", str(tmp_path / "resumed")], env=environment, check=True)
    assert not folder.exists()
    resumed, history = torch.load(tmp_path / "resumed", weights_only=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = net(drop_rate=0.3)
        result = zoo.transfer(model, images(), "lp_ft", val=0.25, epochs=12, schedule="cosine",
                              seed=7, augment="basic")
    finally:
        torch.set_num_threads(threads)
    assert same(state(model), resumed)
    assert [(r["phase"], r["loss"], r["val_nll"]) for r in result.history] == history


def test_the_checkpoint_of_another_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                            ) -> None:
    epoch = Loop._epoch

    def stop(self: Loop, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number)

    monkeypatch.setattr(Loop, "_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        zoo.transfer(net(), images(), epochs=4, checkpoint=tmp_path)
    monkeypatch.setattr(Loop, "_epoch", epoch)
    for changed, told in (({"lr": 0.5}, "lr was 0.001 and is 0.5"),
                          ({"hint": 2.0}, "options was .*'hint': 1.0.* and is .*'hint': 2.0"),
                          ({"activation": "tanh"}, "activation was None and is 'tanh'"),
                          ({"teachers": [net(1)]}, "teachers was"),
                          ({"val": images(seed=2)}, "val was None and is")):
        model = net()
        before = state(model)
        with pytest.raises(TrainingError, match=f"the checkpoint of another transfer: .*{told}"):
            zoo.transfer(model, images(), **{"epochs": 4, "checkpoint": tmp_path, **changed})
        assert same(state(model), before)
    model, whole = net(5), net()
    zoo.transfer(model, images(), epochs=4, checkpoint=tmp_path)
    zoo.transfer(whole, images(), epochs=4)
    assert same(state(model), state(whole))


@pytest.mark.parametrize(("settings", "problem"), [
    ({"epochs": 0}, "epochs is 0, expected a whole number, 1 or more"),
    ({"epochs": 1.5}, "epochs is 1.5, expected a whole number"),
    ({"batch_size": 0}, "batch_size is 0, expected a whole number, 1 or more"),
    ({"warmup_epochs": -1}, "warmup_epochs is -1, expected a whole number, 0 or more"),
    ({"workers": -1}, "workers is -1, expected a whole number, 0 or more"),
    ({"seed": -1}, "seed is -1, expected a whole number, 0 or more"),
    ({"seed": 2**32}, "seed is 4294967296, expected less than 2³²"),
    ({"lr": 0}, "lr is 0, expected more than 0"),
    ({"lr": float("nan")}, "lr is nan, expected more than 0"),
    ({"clip_grad": -1.0}, "clip_grad is -1.0, expected more than 0"),
    ({"weight_decay": -1.0}, "weight_decay is -1.0, expected 0 or more"),
    ({"patience": 2}, "patience waits for an improvement on validation data, and there are none; "
                      "pass val="),
    ({"patience": 0, "val": 0.5}, "patience is 0, expected a whole number, 1 or more"),
    ({"precision": "float16"}, "precision is 'float16', expected float32 or bfloat16"),
    ({"precision": "bfloat"}, "'bfloat' is no floating type; did you mean 'bfloat16'"),
    ({"loss": "focl"}, "no loss is called 'focl'; did you mean 'focal'"),
    ({"label_smoothing": -0.1}, "label_smoothing is -0.1, expected"),
    ({"optimizer": "adamm"}, "timm cannot make the optimizer 'adamm': .*; did you mean 'adam"),
    ({"optimizer": "adahessian"}, "the optimizer 'adahessian' needs second derivatives, which the "
                                  "loop does not compute; use another, such as 'adamw'"),
    ({"schedule": "cosin"}, "timm cannot make the schedule 'cosin': .*; did you mean 'cosine'"),
    ({"schedule": "plateau"}, "timm cannot make the schedule 'plateau': "),
    ({"augment": "rnd"}, "timm cannot augment by 'rnd'"),
    ({"augment": {"scale": {1}}}, r"augment is .*, expected a name or a mapping of JSON values"),
    ({"activation": "rely"}, "no activation is called 'rely'; did you mean 'relu'"),
    ({"val": 1.5}, r"val is 1.5, expected data or a share in \(0, 1\)"),
    ({"hnt": 1.0}, "no option is called 'hnt'; did you mean 'hint'"),
    ({"unlabelled": "digits"}, "zoo/finetune: it does not use unlabelled data; leave it out"),
    ({"method": "dann"}, "zoo/dann: it adapts to target images; pass unlabelled=…"),
    ({"method": "linear_probe", "teachers": [None]},
     "zoo/linear_probe: it does not learn from teachers; leave them out"),
    ({"teachers": ["resnet18"]}, "zoo/finetune: the teacher 'resnet18' is not a zoo.Model"),
    ({"teachers": zoo.backbone("mnist_cnn", num_classes=4, device="cpu")},
     r"zoo/finetune: teachers is a model, expected a list of models: teachers=\[teacher\]"),
    ({"method": "lp_ft", "epochs": 1},
     "zoo/lp_ft: it trains in 2 parts and epochs is 1; expected 2 or more"),
], ids=str)
def test_what_is_refused(settings: dict[str, Any], problem: str) -> None:
    model = net()
    before = state(model)
    with pytest.raises(OptionError, match=problem):
        zoo.transfer(model, images(), **settings)
    assert same(state(model), before)
    assert model.classes == CLASSES
    assert "Tanh" not in str(model)


def test_names_and_data_that_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"transfer trains the model that it is given, and "
                       r"'mnist_cnn' is not one; build it first: model = zoo.backbone"):
        zoo.transfer("mnist_cnn", images())  # type: ignore[arg-type]
    model = net()
    with pytest.raises(OptionError, match="a model cannot be its own teacher; pass a copy"):
        zoo.transfer(model, images(), teachers=[model])
    with pytest.raises(DataError, match="these data have no labels"):
        zoo.transfer(net(), images().without_labels())
    with pytest.raises(DataError, match="a class 'd' that is not among the 3 classes"):
        zoo.transfer(net(), images(), val=ImageData(torch.rand(1, 3, 8, 8), [0], ["d"]))


def test_a_last_batch_of_one_is_left_out() -> None:
    model = with_norms()
    result = zoo.transfer(model, images(33, 32), epochs=1, batch_size=16, norms="train")
    assert len(result.history) == 1


def test_an_accelerator_of_somebody_else_changes_nothing() -> None:
    from accelerate import Accelerator

    plain, beside = net(), net()
    zoo.transfer(plain, images(), epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=4, cpu=True)
    try:
        zoo.transfer(beside, images(), epochs=1)
        assert same(state(plain), state(beside))
        zoo.transfer(beside, images(), epochs=1, precision="bfloat16")
        assert theirs.gradient_accumulation_steps == 4
        assert theirs.mixed_precision == "bf16"
    finally:
        theirs.state._reset_state(reset_partial_state=True)
