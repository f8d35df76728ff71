from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import TrainingError
from zoo.model import Model
from zoo.training.checkpoints import Checkpoint, Kept
from zoo.training.losses import criterion
from zoo.transfers.objective import Objective


def parts(seed: int = 0) -> tuple[Objective, torch.optim.Optimizer]:
    model: Model = zoo.backbone("mnist_cnn", num_classes=3, image_size=8, device="cpu", seed=seed)
    objective = Objective(model, criterion("cross_entropy"), trunk=False)
    objective.choose_trained()
    head = [p for p in model.parameters() if p.requires_grad]
    return objective, torch.optim.Adam(head)


def change(objective: Objective, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.add_(by)


def row(accuracy: float, nll: float) -> dict[str, Any]:
    return {"val_accuracy": accuracy, "val_nll": nll}


def head(objective: Objective) -> float:
    return next(p for p in objective.parameters() if p.requires_grad).flatten()[0].item()


def test_best_is_by_accuracy_then_nll() -> None:
    objective, _ = parts()
    kept = Kept(objective)
    start = head(objective)
    for accuracy, nll in ((0.5, 1.0), (0.5, 0.9), (0.5, 0.95), (0.4, 0.1)):
        change(objective)
        kept.keep(row(accuracy, nll))
    assert kept.waiting == 2
    kept.restore_best()
    assert head(objective) == pytest.approx(start + 2)
    kept.restore_last()
    assert head(objective) == pytest.approx(start + 4)


def test_only_what_trains_is_copied() -> None:
    objective, _ = parts()
    kept = Kept(objective)
    frozen = {name for name, p in objective.named_parameters() if not p.requires_grad}
    assert frozen
    assert not frozen & kept.last.keys()


def test_without_a_folder_nothing_is_written(tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    objective, optimizer = parts()
    checkpoint = Checkpoint(None, {}, writes=True)
    checkpoint.write(0, 1, objective, optimizer, Kept(objective), [])
    assert checkpoint.resume(0, objective, optimizer, Kept(objective)) == 0
    checkpoint.finish()
    assert list(tmp_path.iterdir()) == []


def test_round_trip(tmp_path: Path) -> None:
    objective, optimizer = parts()
    kept = Kept(objective)
    change(objective)
    kept.keep(row(0.9, 0.1))
    change(objective)
    kept.keep(row(0.8, 0.2))
    optimizer.param_groups[0]["lr"] = 0.5
    Checkpoint(tmp_path / "c", {"lr": 1}, writes=True).write(
        1, 2, objective, optimizer, kept, [{"loss": 0.5}])

    other, fresh = parts(seed=1)
    again = Checkpoint(tmp_path / "c", {"lr": 1}, writes=True)
    history: list[dict[str, Any]] = []
    again.restore_model(other.model, history)
    assert history == [{"loss": 0.5}]
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(),
                                                 objective.state_dict().values(), strict=True))
    assert again.phase == 1
    restored = Kept(other)
    assert again.resume(0, other, fresh, restored) == 0
    assert again.resume(1, other, fresh, restored) == 2
    assert (restored.score, restored.waiting) == ((0.9, -0.1), 1)
    assert fresh.param_groups[0]["lr"] == 0.5
    restored.restore_best()
    kept.restore_best()
    assert head(other) == head(objective)
    again.finish()
    assert not (tmp_path / "c").exists()


def test_a_folder_with_other_things_stays(tmp_path: Path) -> None:
    objective, optimizer = parts()
    (tmp_path / "mine.txt").write_text("x")
    checkpoint = Checkpoint(tmp_path, {}, writes=True)
    checkpoint.write(0, 1, objective, optimizer, Kept(objective), [])
    checkpoint.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_one_process_writes(tmp_path: Path) -> None:
    objective, optimizer = parts()
    Checkpoint(tmp_path / "c", {}, writes=False).write(
        0, 1, objective, optimizer, Kept(objective), [])
    assert not (tmp_path / "c").exists()


def test_another_transfer_is_refused(tmp_path: Path) -> None:
    objective, optimizer = parts()
    Checkpoint(tmp_path, {"lr": 0.1, "seed": 0}, writes=True).write(
        0, 1, objective, optimizer, Kept(objective), [])
    with pytest.raises(TrainingError, match=r"transfer.ckpt is the checkpoint of another transfer: "
                                            r"lr was 0.1 and is 0.2. Remove it to start anew"):
        Checkpoint(tmp_path, {"lr": 0.2, "seed": 0}, writes=True)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "transfer.ckpt").write_bytes(b"PK half of one")
    with pytest.raises(TrainingError, match=r"transfer.ckpt is not a checkpoint, or damaged \(\w+\)"
                                            ". Remove it to start anew"):
        Checkpoint(tmp_path, {}, writes=True)
