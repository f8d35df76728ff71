"""`auto`: try members and fusions of them on held-out images, and take what is best for certain."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.assembly.contenders import Planned, in_turn, knowing, known_base, legal, wanted
from zoo.assembly.material import Material
from zoo.assembly.trying import Candidate, Probe, Single
from zoo.building import seeded
from zoo.choosing import (
    Answered,
    Decision,
    Limit,
    Rung,
    Seconds,
    Trials,
    deal,
    decide,
    halve,
    in_words,
    rungs,
)
from zoo.datasets import load_data
from zoo.errors import FusionError, OptionError, ZooError
from zoo.features import evaluating
from zoo.measures import mcnemar, measure, paired_gain, wilson
from zoo.model import Model
from zoo.progress import Advance, say, task
from zoo.training.processes import processes

_TRIALS = 30
# Images times epochs of a head, by default.
_PASSES = 40_000


def auto(
    models: Sequence[Model],
    *,
    data: Any,
    base: Model | None = None,
    device: torch.device,
    seed: int = 0,
    budget: float | None = None,
    trials: int | None = None,
    strategies: str | list[str] | None = None,
    penalty: float = 0.0,
    penalty_on: Literal["parameters", "latency"] = "parameters",
    errors: float = 1.0,
    folds: int = 5,
    head_epochs: int | None = None,
) -> Model:
    """The best of the members and the fusions of them, by cross-validation on the data.

    models: the members. data: labelled images that nothing was trained on and no test will use.
    The model's recipe has everything that was tried under `"auto"`. With `trials` the choice
    depends on the seed alone; with `budget` the clock decides how many are tried. Raises
    OptionError, DataError for too few images, FusionError where nothing asked for can fuse these.

    Options:
        budget: seconds for trying, beside those for the members' features; may run over by one
            try; not where several processes train together
        trials: how many candidates are tried beside the single members, by default 30
        strategies: names or patterns of those to try, ["mean", "acme/*"]; by default all
        penalty: points of accuracy that a candidate pays for each doubling of its cost
        penalty_on: the cost, "parameters" or "latency" (measured here and now, one image)
        errors: standard errors by which a fusion must lead to be taken before something simpler
        folds: parts of the data, each judged by what was fitted on the others
        head_epochs: of training a fusion of features; by default 20, fewer from 2,000 images on
    """
    _check(budget, trials, penalty, errors, folds, head_epochs)
    if budget is not None and processes(models[0]).num_processes > 1:
        raise OptionError("zoo/auto", f"budget is {budget}, and several processes would try "
                          "as much as each has time for, and not the same; pass trials")
    asked = wanted(strategies)
    size = max(model.image_size for model in models)
    given = load_data(data, role="train", image_size=size)
    able, classes = knowing(models, given.classes)
    images = given.with_classes(classes)
    assert images.labels is not None
    order, fold = deal(images.labels, folds, seed)
    asked_base = base
    base = known_base(models) if base is None else base
    specs, left_out = legal(models, able, base, asked, chosen=strategies is not None)
    start = time.perf_counter()
    material = Material(models, able, images, given, base, seed=seed, device=device)
    computing = time.perf_counter() - start
    limit: Limit = (Trials(trials or _TRIALS) if budget is None
                    else Seconds(budget, time.perf_counter))
    epochs = head_epochs or max(5, min(20, _PASSES // len(images)))
    levels = rungs(len(images), epochs)
    trying = _Trying(material, order, fold, levels[-1], penalty / 100, penalty_on)
    singles = trying.singles()
    failed = [one for one in singles if trying.attempt(one, levels[-1]) is None]
    if len(failed) == len(singles):
        raise FusionError("zoo/auto", f"no single member works: {trying.rows[0]['error']}",
                          "Fuse them by one strategy, which says more")
    with ExitStack() as bars:
        ticks: list[Advance] = []

        def entering(rung: int, count: int) -> None:
            bars.close()
            ticks[:] = [bars.enter_context(
                task(f"auto {rung + 1}/{len(levels)}", count, "candidates"))]

        def attempt(candidate: Planned, rung: Rung) -> tuple[float, float] | None:
            found = trying.attempt(candidate, rung)
            ticks[0]()
            return found

        planned = in_turn(specs)
        halve(planned, levels, attempt, limit, lambda one: one.kind, entering)
    tried = {row["strategy"] for row in trying.rows}
    limited = "budget" if budget is not None else "trials"
    left_out |= {one.strategy: f"the {limited} ended before its turn" for one in planned
                 if one.strategy not in tried}
    decision, model = trying.settle(errors, epochs)
    reason = in_words(decision, len(trying.finished), errors, penalised=penalty > 0)
    say(f"auto: {reason}")
    made_of = _made_of(models, asked_base, model)
    model.recipe["auto"] = {
        "chosen": decision.chosen.name, "reason": reason, "ranking": trying.ranking(decision),
        "best_single": decision.single.name, "nested_gain": decision.nested,
        "images": len(images), "folds": folds, "errors": errors, "penalty": penalty,
        "penalty_on": penalty_on, "budget": budget,
        "trials": None if budget is not None else trials or _TRIALS, "seed": seed,
        "asked": {"strategies": strategies, "head_epochs": head_epochs},
        "data": given.fingerprint(), **made_of,
        "not_tried": left_out, "seconds": time.perf_counter() - start,
        "seconds_for_features": computing}
    return model


def _made_of(models: Sequence[Model], base: Model | None, model: Model) -> dict[str, Any]:
    """The members and the base that was given, for a choice that is to be made again; what the
    recipe of the chosen model has already is left out."""
    def known(told: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in told.items() if key != "model"}

    sources = [each.told(apart=True) for each in models]
    told: dict[str, Any] = {}
    if list(map(known, sources)) != list(map(known, model.recipe.get("sources") or ())):
        told["sources"] = sources
    if base is not None:
        source = base.told(apart=True)
        if "sources" in told or known(source) != known(model.recipe.get("base") or {}):
            told["base"] = source
    return told


class _Trying:
    """The candidates' answers, and a row of the ranking for each."""

    def __init__(
        self, material: Material, order: Tensor, fold: Tensor, last: Rung, penalty: float,
        penalty_on: str,
    ) -> None:
        self.last = last
        self.material = material
        self.order = order
        self.fold = fold
        self.penalty = penalty
        self.penalty_on = penalty_on
        self.rows: list[dict[str, Any]] = []
        self.finished: dict[str, tuple[Candidate, Answered]] = {}
        self._row_of: dict[int, dict[str, Any]] = {}
        self._latency = _Latency(material)
        self._cheapest = math.inf

    def singles(self) -> list[Candidate]:
        material = self.material
        found = [Single(material, number) if number in material.able else Probe(material, number)
                 for number in range(len(material.models))]
        if self.penalty:
            self._cheapest = min(self._cost(single) for single in found)
        return list(found)

    def attempt(self, given: Candidate | Planned, rung: Rung) -> tuple[float, float] | None:
        """Try one, write its row, and give its score and negative NLL; None where it fails."""
        row = self._row(given)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                candidate = given if isinstance(given, Candidate) else given.built(self.material)
                answered = self._asked(candidate, rung)
        except Exception as error:  # a plugin's strategy may raise anything, and is one of many
            if isinstance(error, OptionError) and isinstance(given, Planned) and given.options:
                self.rows.remove(row)  # half or twice the default, which nobody asked for
                return None
            row |= {"error": str(error) if isinstance(error, ZooError) and str(error)
                    else f"{type(error).__name__}: {error}"}
            row["seconds"] += time.perf_counter() - start
            return None
        right = int(answered.correct.sum())
        row |= {"options": dict(candidate.options), "images": rung.images,
                "epochs": rung.epochs, "accuracy": answered.accuracy,
                "interval": list(wilson(right, rung.images)), "nll": answered.nll,
                "score": answered.score, "parameters": candidate.parameters()}
        if self.penalty and self.penalty_on == "latency":
            row["latency"] = self._latency.of(candidate.runs())
        row["seconds"] += time.perf_counter() - start
        if rung == self.last:
            self.finished[candidate.name] = candidate, answered
        return answered.score, -answered.nll

    def settle(self, errors: float, epochs: int) -> tuple[Decision, Model]:
        """The decision, and the model that it takes, fitted on all images. What cannot be is
        struck out, and decided anew."""
        while True:
            decision = decide([answered for _, answered in self.finished.values()], self.fold,
                              errors)
            candidate, _ = self.finished[decision.chosen.name]
            try:
                return decision, candidate.final(epochs)
            except Exception as error:
                if decision.chosen is decision.single:
                    raise
                del self.finished[candidate.name]
                next(row for row in self.rows if row["name"] == candidate.name)["error"] = (
                    f"on all images: {type(error).__name__}: {error}")

    def ranking(self, decision: Decision) -> list[dict[str, Any]]:
        """All rows, the best first: those that came to the last rung, the others, the failed."""
        for row in self.rows:
            if row["name"] in self.finished:
                _, answered = self.finished[row["name"]]
                gain = paired_gain(answered.correct, decision.single.correct)
                row["gain"] = gain["gain"]
                row["gain_interval"] = [gain["low"], gain["high"]]
                row["p"] = mcnemar(answered.correct, decision.single.correct)["p"]
            row["finished"] = row["name"] in self.finished
            row["chosen"] = row["name"] == decision.chosen.name
        return sorted(self.rows, key=lambda row: (
            row["error"] is not None, not row["finished"], -row.get("images", 0),
            -row.get("score", 0.0)))

    def _asked(self, candidate: Candidate, rung: Rung) -> Answered:
        rows = self.order[:rung.images]
        fold = self.fold[rows]
        logits = torch.empty(len(rows), len(candidate.classes))
        for number in sorted(set(fold.tolist())):
            with seeded(self.material.seed):
                logits[fold == number] = candidate.answers(
                    rows[fold != number], rows[fold == number], rung.epochs).float()
        labels = self.material.labels(candidate.classes)[rows]
        measured = measure(logits, labels, candidate.classes)
        toll = (self.penalty * math.log2(self._cost(candidate) / self._cheapest)
                if self.penalty else 0.0)
        # In the order of the images, and not in that in which they were dealt.
        correct = (logits.argmax(1) == labels)[rows.argsort()]
        return Answered(candidate.name, correct, measured["nll"], candidate.rank, toll)

    def _cost(self, candidate: Candidate) -> float:
        return (self._latency.of(candidate.runs()) if self.penalty_on == "latency"
                else candidate.parameters())

    def _row(self, given: Candidate | Planned) -> dict[str, Any]:
        row = self._row_of.get(id(given))
        if row is None:
            row = {"name": given.name, "kind": given.kind, "strategy": given.strategy,
                   "options": dict(given.options), "error": None, "seconds": 0.0}
            self._row_of[id(given)] = row
            self.rows.append(row)
        return row


class _Latency:
    """Seconds that an image takes in each member, one by one, measured when it is asked for."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._seconds: dict[int, float] = {}

    def of(self, members: Sequence[int]) -> float:
        return sum(self._one(number) for number in members)

    @torch.inference_mode()
    def _one(self, number: int) -> float:
        if number not in self._seconds:
            model = self._material.models[number]
            side = model.image_size
            image = torch.rand(1, 3, side, side, device=model.device)
            taken = []
            with evaluating(model):
                for _ in range(6):  # the first ones are slower
                    start = time.perf_counter()
                    model(image).sum().item()
                    taken.append(time.perf_counter() - start)
            self._seconds[number] = min(taken)
        return self._seconds[number]


def _check(
    budget: float | None, trials: int | None, penalty: float, errors: float, folds: int,
    epochs: int | None,
) -> None:
    if budget is not None and trials is not None:
        raise OptionError("zoo/auto", f"budget is {budget} and trials is {trials}; give one of "
                          "the two")
    for name, given, right, expected in (
        ("budget", budget, budget is None or budget > 0, "more than 0 seconds"),
        ("trials", trials, trials is None or trials > 0, "1 or more"),
        ("penalty", penalty, penalty >= 0, "0 or more points"),
        ("errors", errors, errors >= 0, "0 or more"),
        ("folds", folds, folds > 1, "2 or more"),
        ("head_epochs", epochs, epochs is None or epochs > 0, "1 or more"),
    ):
        if not right:
            raise OptionError("zoo/auto", f"{name} is {given}, expected {expected}")
