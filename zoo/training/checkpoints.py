"""The last whole epoch and the best one of a transfer: in memory, and on disk so that an
interrupted transfer goes on from there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.atomic import atomic_file
from zoo.errors import TrainingError
from zoo.model import Model
from zoo.transfers.objective import Objective

_FILE = "transfer.ckpt"


class Kept:
    """What an epoch can change, after the last whole epoch and after the best one on validation:
    the trained parameters and all buffers."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.last = self._copy()
        self.best: dict[str, Tensor] | None = None
        self.score: tuple[float, float] | None = None
        self.waiting = 0

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take over the epoch that this row of the history describes."""
        self.last = self._copy()
        if "val_accuracy" not in row:
            return
        score = (row["val_accuracy"], -row["val_nll"])
        if self.score is None or score > self.score:
            self.score, self.best, self.waiting = score, self.last, 0
        else:
            self.waiting += 1

    def restore_last(self) -> None:
        self.objective.load_state_dict(self.last, strict=False)

    def restore_best(self) -> None:
        self.objective.load_state_dict(self.best or self.last, strict=False)

    def _copy(self) -> dict[str, Tensor]:
        moving = {name for name, p in self.objective.named_parameters() if p.requires_grad}
        moving |= {name for name, _ in self.objective.named_buffers()}
        return {name: tensor.detach().clone()
                for name, tensor in self.objective.state_dict().items() if name in moving}


class Checkpoint:
    """One file in a folder, replaced after every epoch and removed at the end.

    folder: None keeps nothing. identity: JSON values that say which transfer it is. writes: False
    in all but one of several processes.

    Raises TrainingError when the folder has the checkpoint of another transfer, or a damaged one.
    """

    def __init__(
        self, folder: str | Path | None, identity: Mapping[str, Any], *, writes: bool
    ) -> None:
        self.file = Path(folder).expanduser() / _FILE if folder is not None else None
        self.identity = json.dumps(identity, sort_keys=True)
        self.writes = writes
        self.saved: dict[str, Any] | None = None
        if self.file is not None and self.file.exists():
            try:
                self.saved = torch.load(self.file, map_location="cpu", weights_only=True)
                saved = json.loads(self.saved["identity"])
            except Exception as error:  # a damaged file raises nearly anything
                raise TrainingError(f"{self.file} is not a checkpoint, or damaged "
                                    f"({type(error).__name__}). Remove it to start anew") from error
            self._want_same(saved, json.loads(self.identity))

    @property
    def phase(self) -> int:
        """The phase that an earlier run was in; those before it are done."""
        return int(self.saved["phase"]) if self.saved else 0

    def restore_model(self, model: Model, history: list[dict[str, Any]]) -> None:
        """Put back the weights and the history of the earlier run, if there was one."""
        if self.saved:
            model.load_state_dict(self.saved["model"])
            history.extend(self.saved["history"])

    def resume(
        self, phase: int, objective: Objective, optimizer: torch.optim.Optimizer, kept: Kept
    ) -> int:
        """Put back what the earlier run had in this phase; gives the epochs it had done."""
        if self.saved is None or phase != self.phase:
            return 0
        objective.load_state_dict(self.saved["objective"])
        optimizer.load_state_dict(self.saved["optimizer"])
        kept.last = self.saved["last"]
        kept.best, kept.score = self.saved["best"], self.saved["score"]
        kept.waiting = self.saved["waiting"]
        return int(self.saved["epochs"])

    def write(
        self, phase: int, epochs: int, objective: Objective, optimizer: torch.optim.Optimizer,
        kept: Kept, history: list[dict[str, Any]],
    ) -> None:
        """Keep this phase after so many epochs of it."""
        if self.file is None or not self.writes:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file) as file:
            torch.save({
                "identity": self.identity, "phase": phase, "epochs": epochs, "history": history,
                "model": objective.model.state_dict(), "objective": objective.state_dict(),
                "optimizer": optimizer.state_dict(), "last": kept.last, "best": kept.best,
                "score": kept.score, "waiting": kept.waiting,
            }, file)

    def finish(self) -> None:
        """Remove the file, and the folder if nothing else is in it."""
        if self.file is not None and self.writes:
            self.file.unlink(missing_ok=True)
            with suppress(OSError):
                self.file.parent.rmdir()

    def _want_same(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        changed = [f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
                   for name in ours if theirs.get(name) != ours.get(name)]
        if changed:
            raise TrainingError(f"{self.file} is the checkpoint of another transfer: "
                                f"{'; '.join(changed)}. Remove it to start anew")
