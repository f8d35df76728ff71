"""The last whole epoch of a transfer on disk, so that an interrupted one goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zoo.datasets import ImageData
from zoo.errors import TrainingError
from zoo.model import Model

if TYPE_CHECKING:
    from zoo.training import Settings, _Kept
    from zoo.transfers.objective import Objective

_FILE = "transfer.ckpt"


class Checkpoint:
    """One file in a folder, replaced after every epoch and removed at the end. Without a folder
    nothing is kept."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self.file = folder / _FILE if folder else None
        self.identity = json.dumps(identity, sort_keys=True)
        self.saved: dict[str, Any] | None = None
        if self.file is not None and self.file.exists():
            # Written by ourselves, and still read as data only.
            self.saved = torch.load(self.file, map_location="cpu", weights_only=True)
            self._want_same(json.loads(self.saved["identity"]), json.loads(self.identity))

    @classmethod
    def at(
        cls, folder: str | Path | None, settings: Settings, method: str,
        values: Mapping[str, Any], data: ImageData,
    ) -> Checkpoint:
        """The checkpoint in a folder, for exactly this transfer.

        Raises TrainingError when the folder has one of another transfer.
        """
        identity = {"method": method, "options": dict(values), **asdict(settings),
                    "data": data.fingerprint()} if folder is not None else {}
        return cls(None if folder is None else Path(folder), identity)

    @property
    def phase(self) -> int:
        """The phase that an earlier run was in; those before it are done."""
        return int(self.saved["phase"]) if self.saved else 0

    def restore_model(self, model: Model, history: list[dict[str, Any]]) -> None:
        if self.saved:
            model.load_state_dict(self.saved["model"])
            history.extend(self.saved["history"])

    def resume(self, phase: int, objective: Objective, optimizer: Any, kept: _Kept) -> int:
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
        self, phase: int, epochs: int, objective: Objective, optimizer: Any, kept: _Kept,
        history: list[dict[str, Any]],
    ) -> None:
        if self.file is None or os.environ.get("RANK", "0") != "0":
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        torch.save({
            "identity": self.identity, "phase": phase, "epochs": epochs, "history": history,
            "model": objective.model.state_dict(), "objective": objective.state_dict(),
            "optimizer": optimizer.state_dict(), "last": kept.last, "best": kept.best,
            "score": kept.score, "waiting": kept.waiting,
        }, temporary)
        temporary.replace(self.file)

    def finish(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _want_same(self, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
        changed = [f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
                   for name in ours if theirs.get(name) != ours.get(name)]
        if changed:
            raise TrainingError(f"{self.file} is the checkpoint of another transfer: "
                                f"{'; '.join(changed)}. Remove it to start anew")
