"""Recipe → four steps: a source, a target trained with it, both fused, the target updated.

Every step is kept under a hash of all that it depends on, so that an interrupted or edited run goes
on from the first step that changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import zoo
from zoo.assembly import backbone, fuse
from zoo.cache import read_json, write_json
from zoo.datasets import ImageData, join, load_data
from zoo.errors import RecipeError
from zoo.evaluation import Evaluation, evaluate
from zoo.measures import mcnemar
from zoo.model import Model
from zoo.progress import say
from zoo.recipes import Data, Everything, Recipe, Source, Target, Transfer, read_recipe
from zoo.registry import find
from zoo.report.markdown import write_report
from zoo.specs import FusionSpec, TransferSpec
from zoo.store import load, save
from zoo.training import transfer

STAGES = ("source", "target", "fused", "updated", "everything")


@dataclass
class Run:
    """What a recipe gave. report: the content of `report.json`. model: the fused model. out: the
    folder with the report and the model in it."""

    out: Path
    model: Model
    report: dict[str, Any]


@dataclass
class _Step:
    """One finished step: its model, the hash that names it, and what happened on the way."""

    name: str
    model: Model
    key: str
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path = "run",
    *,
    device: str | torch.device | None = "auto",
) -> Run:
    """Run a recipe: build, train, fuse, update, and measure every stage on the same test set.

    recipe: a YAML file or the same as a mapping; paths in a file are relative to the file. out: the
    folder for `report.json`, `report.md`, the fused model and the finished steps; a second run goes
    on from the first step that changed.

    Raises RecipeError, before any work, with line and field.
    """
    plan = read_recipe(recipe)
    folder = Path(out).expanduser()
    home = Path.cwd() if isinstance(recipe, Mapping) else Path(recipe).expanduser().parent
    start = time.perf_counter()
    kitchen = _Kitchen(plan, folder, home, device)
    steps = kitchen.steps()
    measured = {name: kitchen.measure(step) for name, step in steps.items()}
    fused = steps["fused"].model
    save(fused, folder / plan.save)
    report = _report(plan, kitchen, steps, measured, time.perf_counter() - start)
    write_report(folder, report)
    return Run(folder, fused, report)


class _Kitchen:
    """The data of a recipe, and its steps one after another."""

    def __init__(
        self, recipe: Recipe, out: Path, home: Path, device: str | torch.device | None
    ) -> None:
        self.recipe = recipe
        self.out = out
        self.home = home
        self.device = device
        target = recipe.data.target
        self.size = max(recipe.source.image_size or 0, recipe.target.image_size or 0) or None
        train = self._data(target.train, "train")
        self.test = self._data(target.test, "test")
        if isinstance(target.val, float):
            self.train, self.val = train.split(target.val, seed=recipe.seed)
        else:
            self.train, self.val = train, self._data(target.val, "train")
        self.source_train = (
            self._data(recipe.data.source.train, "train") if recipe.data.source else None)
        self.unlabelled = self._data(target.unlabelled, "train", labelled=False) \
            if target.unlabelled else None
        self._want_separate_test()

    def steps(self) -> dict[str, _Step]:
        source = self._step("source", self.recipe.source, self._source)
        target = self._step("target", self.recipe.target, self._target,
                            [source] if self.recipe.target.start else [])
        fused = self._step("fused", self.recipe.fuse, self._fused, [source, target])
        steps = {"source": source, "target": target, "fused": fused}
        if self.recipe.update:
            steps["updated"] = self._step("updated", self.recipe.update, self._updated,
                                          [target, fused])
        baseline = [self.recipe.everything, self.recipe.target]
        steps["everything"] = self._step("everything", baseline, self._everything)
        return steps

    def measure(self, step: _Step) -> Evaluation:
        attacks = self.recipe.evaluate.attacks
        file = self.out / "steps" / f"{step.name}-{step.key}.measured.json"
        asked = {"test": self.test.fingerprint(), "attacks": attacks}
        kept = read_json(file)
        if kept and kept["asked"] == asked:
            values = kept["measured"]
            return Evaluation(**{**values, "interval": tuple(values["interval"]),
                                 "correct": torch.tensor(kept["correct"]).bool(),
                                 "predictions": torch.tensor(kept["predictions"])})
        result = evaluate(step.model, self.test, attacks=attacks, seed=self.recipe.seed)
        write_json(file, {"asked": asked, "measured": result.as_dict(),
                          "correct": result.correct.int().tolist(),
                          "predictions": result.predictions.tolist()})
        return result

    def _source(self, step: _Step, _: Sequence[Model]) -> Model:
        part: Source = self.recipe.source
        trains_on_target = self.source_train is None
        images = self.train if self.source_train is None else self.source_train
        model = backbone(part.backbone, pretrained=part.pretrained, image_size=part.image_size,
                         classes=images.classes, device=self.device, seed=self.recipe.seed)
        method = part.transfer or Transfer(method="linear_probe")
        self._transfer(step, model, images, method, self.val if trains_on_target else None)
        if set(model.classes) != set(self.test.classes):
            step.notes.append("the source's classes are not the target's: its head was probed "
                              "on the target's training data to be measured on the test set")
            self._transfer(step, model, self.train, Transfer(method="linear_probe"), self.val)
        return model

    def _target(self, step: _Step, before: Sequence[Model]) -> Model:
        part: Target = self.recipe.target
        source = before[0] if before else None
        if source is not None and _same_architecture(part, self.recipe.source):
            step.notes.append("it starts from the source's weights")
            model = copy.deepcopy(source)
            self._transfer(step, model, self.train, part.transfer, self.val)
            return model
        model = backbone(part.backbone, pretrained=part.pretrained, image_size=part.image_size,
                         classes=self.train.classes, device=self.device, seed=self.recipe.seed)
        teachers = self._teachers(step, source, part.transfer)
        self._transfer(step, model, self.train, part.transfer, self.val, teachers)
        return model

    def _fused(self, step: _Step, before: Sequence[Model]) -> Model:
        part = self.recipe.fuse
        spec = find(part.strategy, FusionSpec)
        base = None
        if "base" in spec.uses:
            base = backbone(self.recipe.source.backbone, pretrained=self.recipe.source.pretrained,
                            image_size=self.recipe.source.image_size, device=self.device,
                            classes=self.train.classes, seed=self.recipe.seed)
        model = fuse(before, part.strategy, base=base, data=self.val, seed=self.recipe.seed,
                     classes=self.train.classes if spec.kind == "features" else None,
                     **part.options)
        method = part.transfer or (Transfer(method="linear_probe")
                                   if spec.kind == "features" else None)
        if method:
            self._transfer(step, model, self.train, method, self.val)
        return model

    def _updated(self, step: _Step, before: Sequence[Model]) -> Model:
        assert self.recipe.update is not None
        model = copy.deepcopy(before[0])
        teachers = self._teachers(step, before[1], self.recipe.update)
        self._transfer(step, model, self.train, self.recipe.update, self.val, teachers)
        return model

    def _everything(self, step: _Step, _: Sequence[Model]) -> Model:
        part: Everything = self.recipe.everything
        target = self.recipe.target
        own = part.backbone is not None
        model = backbone(part.backbone or target.backbone,
                         pretrained=part.pretrained if own else target.pretrained,
                         image_size=part.image_size if own else target.image_size,
                         classes=self.train.classes, device=self.device, seed=self.recipe.seed)
        images = [self.train, self.val]
        if self.source_train is not None:
            if set(self.source_train.classes) == set(self.train.classes):
                images.append(self.source_train)
            else:
                step.notes.append("the source's data have other classes and are not in it")
        self._transfer(step, model, join(images), part.transfer or target.transfer, None)
        return model

    def _teachers(self, step: _Step, teacher: Model | None, method: Transfer) -> Sequence[Model]:
        if teacher is None:
            return ()
        if "teachers" in find(method.method, TransferSpec).uses:
            return [teacher]
        step.notes.append(f"{method.method} does not learn from teachers; it was used without")
        return ()

    def _transfer(
        self, step: _Step, model: Model, images: ImageData, method: Transfer,
        val: ImageData | None, teachers: Sequence[Model] = (),
    ) -> None:
        uses = find(method.method, TransferSpec).uses
        result = transfer(
            model, images, method.method, val=val, teachers=teachers, epochs=method.epochs,
            unlabelled=self.unlabelled if "unlabelled" in uses else None, seed=self.recipe.seed,
            checkpoint=self.out / "steps" / f"{step.name}-{step.key}.part", **method.options)
        step.history += result.history
        step.notes += result.notes

    def _step(
        self, name: str, part: Any, make: Callable[[_Step, Sequence[Model]], Model],
        before: Sequence[_Step] = (),
    ) -> _Step:
        """The step as it was kept, or made now and kept."""
        key = self._key(name, part, before)
        folder = self.out / "steps" / f"{name}-{key}"
        log = folder.with_suffix(".json")
        kept = read_json(log)
        if kept is not None and folder.is_dir():
            say(f"{name}: kept from an earlier run")
            return _Step(name, load(folder, device=self.device), key, **kept)
        say(f"{name}: {_title(part)}")
        start = time.perf_counter()
        step = _Step(name, None, key)  # type: ignore[arg-type]
        step.model = make(step, [each.model for each in before])
        step.seconds = time.perf_counter() - start
        save(step.model, folder)
        write_json(log, {"notes": step.notes, "history": step.history, "seconds": step.seconds})
        return step

    def _key(self, name: str, part: Any, before: Sequence[_Step]) -> str:
        """A hash of everything that a step depends on."""
        parts = part if isinstance(part, list) else [part]
        told = {
            "zoo": zoo.__version__, "step": name, "seed": self.recipe.seed,
            "recipe": [each.model_dump() for each in parts],
            "source": self.recipe.source.model_dump() if before else None,
            "before": [each.key for each in before],
            "data": [images.fingerprint() for images in
                     (self.train, self.val, self.source_train, self.unlabelled) if images],
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def _data(self, given: Data, role: str, labelled: bool = True) -> ImageData:
        local = self.home / given.data
        place: Any = local if local.exists() else given.data
        return load_data(place, split=given.split, role=role, image_size=self.size,  # type: ignore[arg-type]
                         labelled=labelled, limit=given.limit, seed=given.seed)

    def _want_separate_test(self) -> None:
        target = self.recipe.data.target
        if target.test == target.train and target.test.split is not None:
            raise RecipeError("recipe", [(None, "data.target.test", "is the training data; "
                                          "a test set is one that nothing was trained on")])


def _same_architecture(target: Target, source: Source) -> bool:
    return (target.backbone == source.backbone
            and (target.image_size or source.image_size) == source.image_size)


def _title(part: Any) -> str:
    for each in part if isinstance(part, list) else [part]:
        for name in ("backbone", "strategy", "method"):
            if getattr(each, name, None):
                return str(getattr(each, name))
    return ""


def _report(
    recipe: Recipe, kitchen: _Kitchen, steps: Mapping[str, _Step],
    measured: Mapping[str, Evaluation], seconds: float,
) -> dict[str, Any]:
    stages = {}
    for name, step in steps.items():
        stages[name] = {**measured[name].as_dict(), "model": step.model.name,
                        "train_seconds": step.seconds, "notes": step.notes,
                        "history": step.history}
    pairs = [("fused", other) for other in steps if other != "fused"]
    if "updated" in steps:
        pairs.append(("updated", "target"))
    tests = [{"a": a, "b": b, **mcnemar(measured[a].correct, measured[b].correct)}
             for a, b in pairs]
    return {
        "stages": stages,
        "tests": tests,
        "data": {"train": len(kitchen.train), "val": len(kitchen.val), "test": len(kitchen.test),
                 "source": len(kitchen.source_train) if kitchen.source_train is not None else 0,
                 "classes": list(kitchen.test.classes)},
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "seed": recipe.seed,
        "seconds": seconds,
        "zoo": zoo.__version__,
    }
