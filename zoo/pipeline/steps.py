"""The finished steps of a run, each kept in a folder under a hash of all that it depends on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch

import zoo
from zoo.cache import read_json, write_json
from zoo.datasets import ImageData
from zoo.discovery import discovery
from zoo.errors import BadName, FormatError, ZooError
from zoo.evaluation import Evaluation, evaluate
from zoo.model import Model
from zoo.names import Name, parse
from zoo.progress import say
from zoo.store import load, save

_NAMES = ("backbone", "strategy", "method")


@dataclass
class Notes:
    """What happens in a step on the way to its model.

    checkpoints: a folder for those of its transfers. notes: sentences. history: one mapping per
    epoch, as `zoo.transfer` gives it.
    """

    checkpoints: Path
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    transfers: int = 0

    def next_checkpoint(self) -> Path:
        """A folder for the next transfer of this step: each has its own."""
        self.transfers += 1
        return self.checkpoints / str(self.transfers)


@dataclass(frozen=True)
class Step:
    """A finished step: its model, the hash that names it, how it was made, and in how long. kept:
    it was made by an earlier run."""

    name: str
    key: str
    model: Model
    notes: Sequence[str]
    history: Sequence[Mapping[str, Any]]
    seconds: float
    kept: bool


class Steps:
    """The steps in a folder. A step counts when its record stands beside its model: the model is
    written at once, and the record after it."""

    def __init__(self, folder: Path, device: str | torch.device | None) -> None:
        self.folder = folder
        self.device = device

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder. The lock goes with the process that holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with filelock.FileLock(self.folder / ".lock", timeout=0):
                yield
        except filelock.Timeout:
            raise ZooError(f"another run is working in {self.folder.parent}; wait for it, or "
                           "choose another folder with out=") from None

    def get(
        self, name: str, title: str, about: Mapping[str, Any], data: Sequence[ImageData | None],
        before: Sequence[Step], make: Callable[[Notes], Model],
    ) -> Step:
        """The step as it was kept, or made now and kept.

        title: what is made, for people. about: what the recipe says of it, as JSON values. data,
        before: the images and the earlier steps that it is made from.
        """
        key = _key(name, about, data, before)
        folder, record = self.folder / f"{name}-{key}", self.folder / f"{name}-{key}.json"
        kept = self._kept(name, key, folder, record)
        if kept:
            say(f"{name}: {title}, kept from an earlier run")
            return kept
        say(f"{name}: {title}")
        start = time.perf_counter()
        told = Notes(self.folder / f"{name}-{key}.part")
        model = make(told)
        seconds = time.perf_counter() - start
        record.unlink(missing_ok=True)
        save(model, folder)
        write_json(record, {"notes": told.notes, "history": told.history, "seconds": seconds})
        shutil.rmtree(told.checkpoints, ignore_errors=True)
        return Step(name, key, model, told.notes, told.history, seconds, kept=False)

    def measure(
        self, step: Step, test: ImageData, attacks: Mapping[str, Mapping[str, Any]], seed: int
    ) -> Evaluation:
        """What a step is worth on the test set, measured once."""
        file = self.folder / f"{step.name}-{step.key}.measured.json"
        asked = {"test": test.fingerprint(), "attacks": attacks, "seed": seed}
        kept = read_json(file) if step.kept else None
        if kept and kept.get("asked") == asked:
            return Evaluation(**{
                **kept["measured"], "interval": tuple(kept["measured"]["interval"]),
                "correct": torch.tensor(kept["correct"]).bool(),
                "predictions": torch.tensor(kept["predictions"])})
        measured = evaluate(step.model, test, attacks=attacks, seed=seed)
        write_json(file, {"asked": asked, "measured": measured.as_dict(),
                          "correct": measured.correct.int().tolist(),
                          "predictions": measured.predictions.tolist()})
        return measured

    def _kept(self, name: str, key: str, folder: Path, record: Path) -> Step | None:
        told = read_json(record)
        if told is None:
            return None
        try:
            return Step(name, key, load(folder, device=self.device), **told, kept=True)
        except FormatError as error:
            say(f"{name}: what an earlier run kept is damaged and is made again ({error})")
            return None


def _key(
    name: str, about: Mapping[str, Any], data: Sequence[ImageData | None], before: Sequence[Step]
) -> str:
    told = {
        "step": name, "about": about, "before": [step.key for step in before],
        "data": [images.fingerprint() if images else None for images in data],
        "zoo": zoo.__version__, "versions": dict(_versions(about)),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _versions(about: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The distributions behind the names in a part of a recipe; of a folder, its files' times."""
    for field_name, value in about.items():
        if isinstance(value, Mapping):
            yield from _versions(value)
        elif field_name in _NAMES and isinstance(value, str):
            yield from _version(value)


def _version(given: str) -> Iterator[tuple[str, Any]]:
    try:
        reference = parse(given)
    except BadName:
        return
    if isinstance(reference, Name):
        plugin = discovery().get(reference.namespace) if reference.namespace else None
        if plugin:
            yield plugin.namespace, f"{plugin.distribution} {plugin.version}"
        return
    folder = reference if isinstance(reference, Path) else Path(reference.location)
    for file in sorted(folder.glob("*")):
        stat = file.stat()
        yield str(file), [stat.st_size, stat.st_mtime_ns]
