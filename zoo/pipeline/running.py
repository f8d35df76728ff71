"""Recipe → four steps: a source, a target trained with it, both fused, the target updated; and,
to compare with, one model trained on everything."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from zoo.assembly import backbone, fuse
from zoo.datasets import ImageData, join, public_name
from zoo.evaluation import Evaluation
from zoo.model import Model
from zoo.pipeline.content import report_of
from zoo.pipeline.dry_run import dry_run, same_network
from zoo.pipeline.recipe_data import RecipeData, open_data
from zoo.pipeline.recipes import (
    SOURCE,
    TARGET,
    Backbone,
    Fuse,
    Recipe,
    Transfer,
    read_recipe,
)
from zoo.pipeline.steps import Notes, Step, Steps
from zoo.progress import say, task
from zoo.registry import find
from zoo.report.captions import CAPTIONS
from zoo.report.markdown import percent, write_report
from zoo.specs import FusionSpec, TransferSpec
from zoo.store import save
from zoo.training import transfer


@dataclass
class Run:
    """What a recipe gave. report: the content of `report.json`. model: the fused model. out: the
    folder with the report and the model in it."""

    out: Path
    model: Model
    report: dict[str, Any]


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path = "run",
    *,
    device: str | torch.device | None = "auto",
) -> Run:
    """Run a recipe: build, train, fuse, update, and measure every stage on the same test set.

    recipe: a YAML file or the same as a mapping; paths in a file are relative to the file. out: the
    folder for `report.json`, `report.md` with its pictures, the fused model and the finished
    steps; a second run goes on from the first step that changed, an interrupted one from its last
    whole epoch.

    Raises RecipeError, before any work, with line and field; ZooError when another run is working
    in the same folder.
    """
    start = time.perf_counter()
    plan = read_recipe(recipe)
    folder = Path(out).expanduser()
    steps = Steps(folder / "steps", device)
    stages = ["source", "target", "fused", *(["updated"] if plan.update else []), "everything"]
    done: dict[str, Step] = {}
    measured: dict[str, Evaluation] = {}
    with task("run", len(stages), "stages") as advance:
        dry_run(plan)
        data = open_data(plan)
        with steps.locked():
            stage = _Stages(plan, data, steps, device)
            for name in stages:
                step = done[name] = getattr(stage, name)(done)
                measured[name] = replace(
                    steps.measure(step, data.test, plan.evaluate.attacks, plan.seed),
                    data=public_name(plan.data_place(plan.data.target.test.data)))
                say(f"{name}: {percent(measured[name].accuracy)} of {measured[name].n:,} test "
                    f"images right, after {time.perf_counter() - start:.0f} s")
                advance()
            fused = done["fused"].model
            saved = save(fused, folder / plan.save, evaluations=measured,
                         link_members=plan.link_members)
            report = report_of(plan, done, measured, data.sizes, time.perf_counter() - start)
            write_report(folder, report, {name: (saved / name).read_bytes() for name in CAPTIONS
                                          if (saved / name).is_file()})
    return Run(folder, fused, report)


class _Stages:
    """A method for each stage: the steps before it in, its own step out."""

    def __init__(
        self, recipe: Recipe, data: RecipeData, steps: Steps, device: str | torch.device | None
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.steps = steps
        self.device = device

    def source(self, _: Mapping[str, Step]) -> Step:
        part, data = self.recipe.source, self.data

        def make(notes: Notes) -> Model:
            images = data.source or data.train
            model = self._network(part, images)
            self._transfer(notes, model, images, part.transfer, None if data.source else data.val)
            if set(model.classes) != set(data.train.classes):
                notes.notes.append(
                    "its classes are not the target's: its head was probed on the target's "
                    "training images, so that it can be measured on the test set")
                self._transfer(notes, model, data.train, Transfer(method="linear_probe"), data.val)
            return model

        return self._step("source", part.backbone, part, part.transfer, [], make)

    def target(self, done: Mapping[str, Step]) -> Step:
        part, data = self.recipe.target, self.data
        before = [done["source"]] if part.start else []
        goes_on = bool(before) and same_network(self.recipe)

        def make(notes: Notes) -> Model:
            if goes_on:
                notes.notes.append("it starts from the source's weights")
                model = copy.deepcopy(before[0].model)
            else:
                model = self._network(part, data.train)
            self._transfer(notes, model, data.train, part.transfer, data.val,
                           [] if goes_on else before)
            return model

        return self._step("target", part.backbone, part, part.transfer, before, make)

    def fused(self, done: Mapping[str, Step]) -> Step:
        return self._fusion("fused", self.recipe.fuse, done)

    def _fusion(self, name: str, part: Fuse, done: Mapping[str, Step]) -> Step:
        """A fusion, after those that are members of it, each a step of its own."""
        data = self.data
        spec = find(part.strategy, FusionSpec)
        features = spec.kind == "features"
        method = part.transfer or (Transfer(method="linear_probe") if features else None)
        given = [self._ingredient(f"{name}-{number}", each, done)
                 for number, (_, each) in enumerate(part.ingredients, 1)]

        def make(notes: Notes) -> Model:
            members: list[Model | str | Path] = [
                each.model if isinstance(each, Step) else each for each in given]
            base: Model | str | Path | None = members.pop() if part.base is not None else None
            if base is None and part.takes_base_first(spec):
                base, *members = members
            elif base is None and "base" in spec.uses:
                base = self._network(self.recipe.source, data.train)
            model = fuse(members, part.strategy, base=base, data=data.val, seed=self.recipe.seed,
                         classes=data.train.classes if features else None, **part.arguments)
            if method:
                self._transfer(notes, model, data.train, method, data.val)
            if spec.kind == "choice" and "auto" in model.recipe:
                notes.notes.append(model.recipe["auto"]["reason"])
            return model

        return self._step(name, part.strategy, part, method,
                          [each for each in given if isinstance(each, Step)], make,
                          [each for each in given if isinstance(each, str)])

    def _ingredient(self, name: str, given: str | Fuse, done: Mapping[str, Step]) -> Step | str:
        if isinstance(given, Fuse):
            return self._fusion(name, given, done)
        return done[given] if given in (SOURCE, TARGET) else self.recipe.model_place(given)

    def updated(self, done: Mapping[str, Step]) -> Step:
        part, data = self.recipe.update or Transfer(), self.data
        before = [done["target"], done["fused"]]

        def make(notes: Notes) -> Model:
            model = copy.deepcopy(before[0].model)
            self._transfer(notes, model, data.train, part, data.val, before[1:])
            return model

        return self._step("updated", "the target", part, part, before, make)

    def everything(self, _: Mapping[str, Step]) -> Step:
        part, data = self.recipe.baseline, self.data

        def make(notes: Notes) -> Model:
            images = [data.train, data.val]
            if data.source and set(data.source.classes) == set(data.train.classes):
                images.append(data.source)
            elif data.source:
                notes.notes.append("the source's images are of other classes and not in it")
            model = self._network(part, data.train)
            self._transfer(notes, model, join(images), part.transfer, None)
            return model

        return self._step("everything", part.backbone, part, part.transfer, [], make)

    def _step(
        self, name: str, title: str, part: BaseModel, method: Transfer | None,
        before: Sequence[Step], make: Callable[[Notes], Model], others: Sequence[str] = (),
    ) -> Step:
        """others: models that are no steps."""
        about = {**part.model_dump(mode="json", by_alias=True), "seed": self.recipe.seed,
                 "others": {str(number): {"backbone": each} for number, each in enumerate(others)}}
        if isinstance(part, Backbone):
            about["backbone"] = self.recipe.model_place(part.backbone)
        data = [self.data.train, self.data.val, self._unlabelled(method)]
        if name in ("source", "everything"):
            data.append(self.data.source)
        if method:
            title += f", {method.method}"
        return self.steps.get(name, title, about, data, before, make)

    def _network(self, part: Backbone, images: ImageData) -> Model:
        return backbone(self.recipe.model_place(part.backbone), pretrained=part.pretrained,
                        image_size=part.image_size, classes=images.classes, device=self.device,
                        seed=self.recipe.seed, **part.options)

    def _transfer(
        self, notes: Notes, model: Model, images: ImageData, method: Transfer,
        val: ImageData | None, teachers: Sequence[Step] = (),
    ) -> None:
        if teachers and "teachers" not in find(method.method, TransferSpec).uses:
            notes.notes.append(f"{method.method} does not learn from teachers; it had none")
            teachers = ()
        result = transfer(
            model, images, method.method, val=val, teachers=[step.model for step in teachers],
            unlabelled=self._unlabelled(method), seed=self.recipe.seed,
            checkpoint=notes.next_checkpoint(), **method.arguments)
        notes.history += result.history
        notes.notes += result.notes

    def _unlabelled(self, method: Transfer | None) -> ImageData | None:
        uses = find(method.method, TransferSpec).uses if method else ()
        return self.data.unlabelled if "unlabelled" in uses else None
