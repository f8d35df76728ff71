"""The planner: what some models have in common, and which way of fusing them is likely to work.

What it calls likely comes from measurements: networks that were fine-tuned from one start lie in
one basin, where a mean of weights is as good as an ensemble (Wortsman 2022, arXiv:2203.05482;
Neyshabur 2020, arXiv:2008.11687); those that started apart, or whose classifiers did, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.assembly.given import SEPARATE
from zoo.assembly.members import (
    architecture,
    base_of,
    check_models,
    distinct,
    fetch_members,
    model_of,
    spelled,
    want_members,
)
from zoo.assembly.resizing import at_one_size
from zoo.backbones.semantics import classifier_keys
from zoo.errors import FusionError, ZooError
from zoo.fusion.merging import want_finite
from zoo.fusion.norms import norm_keys
from zoo.model import Model
from zoo.registry import find, list_fusions
from zoo.specs import FusionSpec
from zoo.store import network

# Cosine of two networks' weights: fine-tunes of one start are near 1, separate starts near 0.
_ONE_BASIN = 0.8
# Cosine of task vectors above which members say the same, and below which they contradict.
_ALIKE, _AGAINST = 0.3, -0.05
# How many times longer one task vector may be before it drowns the others.
_LOUD = 3.0

OUTLOOKS = ("likely best", "likely good", "possible", "likely to hurt", "not possible")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """How two members lie to each other.

    cosine, head_cosine: of the weights (matrices and kernels) but the classifier's, and of the
    classifier's, by label; None where there is nothing to compare. distance: ‖θ₁ − θ₂‖ / ‖θ̄‖.
    task_cosine: of what each changed in the base.
    """

    members: tuple[str, str]
    cosine: float | None = None
    head_cosine: float | None = None
    distance: float | None = None
    task_cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One strategy for these members. outlook: of OUTLOOKS. why: in words. instead: for what is
    not possible, what would make it so, or do its work. confidence: `"high"` where it was checked
    or measured, else `"medium"` or `"low"`."""

    strategy: str
    kind: str
    outlook: str
    why: str
    instead: str = ""
    confidence: str = "medium"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `zoo.plan` found. `str(plan)` says it in words, `as_dict()` as JSON values.

    members: of each name, architecture, parameters, classes, image size, batch norm, source.
    shared: what all have in common. base: what they started from, as far as is known. task_norms:
    ‖θ − θ₀‖ / ‖θ₀‖ of each. verdicts: all strategies, the most promising first.
    """

    members: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, bool]
    base: str | None
    pairs: tuple[Pair, ...]
    task_norms: Mapping[str, float]
    verdicts: tuple[Verdict, ...]

    def verdict(self, strategy: str) -> Verdict:
        """The verdict on one strategy."""
        name = find(strategy, FusionSpec).name
        return next(verdict for verdict in self.verdicts if verdict.strategy == name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [_member_line(told) for told in self.members]
        same = [name for name, shared in self.shared.items() if shared]
        differ = [name for name, shared in self.shared.items() if not shared]
        lines.append("The same in all: " + (", ".join(same) or "nothing")
                     + (f". Different: {', '.join(differ)}." if differ else "."))
        if self.base:
            lines.append(f"They started from {self.base}.")
        lines += [_pair_line(pair) for pair in self.pairs if pair.cosine is not None]
        if self.task_norms:
            lines.append("Each moved from its base, of the base's length: " + ", ".join(
                f"{name} {norm:.1%}" for name, norm in self.task_norms.items()) + ".")
        for outlook in OUTLOOKS:
            found = [verdict for verdict in self.verdicts if verdict.outlook == outlook]
            if found:
                lines += ["", f"{outlook[0].upper()}{outlook[1:]}:"]
                lines += [f"  {verdict.strategy}: {verdict.why}"
                          + (f" {verdict.instead}" if verdict.instead else "")
                          for verdict in found]
        return "\n".join(lines)


def plan(
    members: Sequence[Model | str | Path],
    *,
    base: Model | str | Path | None = None,
    data: Any = None,
    pretrained: bool = True,
    image_size: int | None = None,
) -> Plan:
    """Say which strategies can fuse these members, which are likely to work, and why.

    Arguments as in `zoo.fuse`. data: only whether there are some. Nothing is trained or fused; the
    members' weights are compared. Raises what `zoo.fuse` raises for members that are none.
    """
    want_members("plan", members, base)
    if not members:
        raise FusionError("plan", "there are none", "Give it one model or more")
    fetched = fetch_members([*members, base])
    models = [model_of(member, pretrained, image_size, fetched) for member in members]
    names = distinct([spelled(member) for member in members])
    started = base_of(models) if base is None else model_of(base, pretrained, image_size, fetched)
    base_name = None if started is None else (
        spelled(base) if base is not None else f"{started.name} (from the members' provenance)")
    *alike, start = at_one_size([*models, started or models[0]])
    states = _comparable(alike)
    base_state = _comparable([models[0], start])[1:] if states and started is not None else []
    shared = _shared(models, states)
    damaged = _damaged(states, base_state)
    if damaged is not None:  # nothing can be measured of it either
        states, base_state = [], []
    geometry = _Geometry(models, states, base_state[0] if base_state else None)
    pairs = tuple(geometry.pair(names, one, other) for one in range(len(models))
                  for other in range(one + 1, len(models)))
    task_norms = {name: geometry.task_norm(number) for number, name in enumerate(names)} \
        if base_state else {}
    outlook = _Outlook(models, pairs, list(task_norms.values()), has_base=bool(base_state),
                       has_data=data is not None)
    verdicts = []
    for name in list_fusions():
        spec = find(name, FusionSpec)
        try:
            if damaged is not None and spec.kind == "weights":
                raise damaged
            check_models(spec, members, alike if spec.kind == "weights" else models,
                         base or ("" if started is None else started.name),
                         start if started and "base" in spec.uses | spec.can_use else None,
                         has_data=data is not None or spec.kind == "outputs")
        except ZooError as error:
            verdicts.append(Verdict(
                strategy=name, kind=spec.kind, outlook="not possible", confidence="high",
                why=_sentence(getattr(error, "reason", str(error))),
                instead=_sentence(getattr(error, "instead", ""))))
        else:
            verdicts.append(outlook.of(spec))
    return Plan(
        members=tuple(_told(model, name) for model, name in zip(models, names, strict=True)),
        shared=shared, base=base_name, pairs=pairs, task_norms=task_norms,
        verdicts=tuple(sorted(verdicts, key=lambda verdict: OUTLOOKS.index(verdict.outlook))))


class _Geometry:
    """Lengths and angles of the members' weights, and of what they changed in the base."""

    def __init__(
        self, models: Sequence[Model], states: Sequence[Mapping[str, Tensor]],
        base: Mapping[str, Tensor] | None,
    ) -> None:
        self.known = bool(states)
        if not states:
            return
        net = network(models[0])
        heads = set(classifier_keys(net))
        skipped = norm_keys(net)
        # Scales and biases start at ones and zeros everywhere, and would make strangers alike.
        body = [key for key, tensor in states[0].items() if tensor.is_floating_point()
                and tensor.ndim > 1 and key not in skipped and key not in heads
                and bool(tensor.isfinite().all())]  # no mask, which is the same in all
        self.body = _gram([{key: state[key] for key in body} for state in states])
        same_labels = all(set(model.classes) == set(models[0].classes) for model in models)
        self.head = _gram([{key: state[key] for key in heads} for state in states]) \
            if heads and same_labels else None
        self.task = self.base_square = None
        if base is not None and all(key in base for key in body):
            self.task = _gram([{key: state[key].double() - base[key].double() for key in body}
                               for state in states])
            self.base_square = float(_gram([{key: base[key] for key in body}])[0, 0])

    def pair(self, names: Sequence[str], one: int, other: int) -> Pair:
        if not self.known:
            return Pair(members=(names[one], names[other]))
        g = self.body
        apart = max(float(g[one, one] + g[other, other] - 2 * g[one, other]), 0) ** 0.5
        mean = float(g[one, one] + g[other, other] + 2 * g[one, other]) ** 0.5 / 2
        return Pair(members=(names[one], names[other]), cosine=_cosine(g, one, other),
                    distance=apart / mean if mean else None,
                    head_cosine=None if self.head is None else _cosine(self.head, one, other),
                    task_cosine=None if self.task is None else _cosine(self.task, one, other))

    def task_norm(self, member: int) -> float:
        if self.task is None or not self.base_square:
            return float("nan")
        return float((self.task[member, member] / self.base_square).sqrt())


class _Outlook:
    """What is to be expected of a strategy that is possible."""

    def __init__(
        self, models: Sequence[Model], pairs: Sequence[Pair], task_norms: Sequence[float], *,
        has_base: bool, has_data: bool,
    ) -> None:
        cosines = [pair.cosine for pair in pairs if pair.cosine is not None]
        heads = [pair.head_cosine for pair in pairs if pair.head_cosine is not None]
        tasks = [pair.task_cosine for pair in pairs if pair.task_cosine is not None]
        self.cosine = min(cosines, default=None)
        self.head = min(heads, default=None)
        self.task = sum(tasks) / len(tasks) if tasks else None
        self.loud = len(task_norms) > 1 and max(task_norms) > _LOUD * max(min(task_norms), 1e-12)
        self.has_base, self.has_data = has_base, has_data
        self.single = len(models) == 1
        self.alike = len({architecture(model) for model in models}) == 1

    def of(self, spec: FusionSpec) -> Verdict:
        def verdict(outlook: str, why: str, confidence: str = "medium") -> Verdict:
            return Verdict(strategy=spec.name, kind=spec.kind, outlook=outlook, why=why,
                           confidence=confidence)

        if spec.kind == "features":
            return verdict("likely good", "a new classifier learns from all members' features; "
                           "it needs labelled training data, and costs all members at inference.")
        if spec.kind == "outputs":
            why = "members of any kind vote; it costs all members at inference."
            return verdict("likely good", ("fitted on held-out data: " if "data" in spec.uses
                                           else "") + why)
        if spec.kind == "choice":
            return verdict("likely best", "it tries the others that are possible, and each member "
                           "alone, on held-out data.")
        return self._of_weights(spec, verdict)

    def _of_weights(self, spec: FusionSpec, verdict: Callable[..., Verdict]) -> Verdict:
        local = spec.name.partition("/")[2]
        own_basins = "graph" in spec.uses
        if self.single or self.cosine is None:
            return verdict("possible", "there is one member, on the line from its base.", "low")
        if self.cosine < SEPARATE:
            if own_basins:
                return verdict("possible", f"their weights lie apart (cosine {self.cosine:.2f}); "
                               "it permutes units until they fit.")
            return verdict("likely to hurt", f"their weights lie apart (cosine {self.cosine:.2f}), "
                           "as after separate starts: between them is a barrier. Align them first "
                           "with 'rebasin', or fuse features or outputs.", "high")
        if self.head is not None and self.head < SEPARATE and self.cosine >= SEPARATE:
            return verdict("likely to hurt", f"their classifiers started apart (cosine "
                           f"{self.head:.2f}) though their trunks did not: train from one probed "
                           "head ('lp_ft'), or fuse features or outputs.")
        if own_basins:
            return verdict("possible", "they lie in one basin already; it finds little to permute.")
        if local in ("swa", "ema"):
            return verdict("possible", "it is for checkpoints of one run, in their order.")
        near = "" if self.cosine >= _ONE_BASIN else (
            f" They are rather far apart (cosine {self.cosine:.2f}): compare on validation.")
        if self.loud and "base" in spec.uses:
            near += " One moved much further than another and will drown it: give weights."
        if spec.uses & {"score", "labels", "data"}:
            return verdict("likely best", "it decides on data, in one basin." + near)
        if self.task is not None:
            if local == "ties" and self.task < _ALIKE:
                return verdict("likely best", f"their changes differ (mean cosine {self.task:.2f}):"
                               " trimming and electing signs keeps them out of each other's way."
                               + near)
            if "base" not in spec.uses and self.task < _AGAINST:
                return verdict("possible", f"their changes contradict each other (mean cosine "
                               f"{self.task:.2f}), and a plain mean cancels them." + near)
            if "base" not in spec.uses and self.task >= _ALIKE:
                return verdict("likely best", f"their changes are alike (mean cosine "
                               f"{self.task:.2f}), as of one task: a mean reduces noise." + near)
        return verdict("likely good" if self.cosine >= _ONE_BASIN else "possible",
                       "they lie in one basin." + near)


def _gram(states: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Inner products of states, float64 [M, M]."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for key in states[0]:
        rows = torch.stack([state[key].detach().flatten().cpu().float() for state in states])
        total += (rows @ rows.T).double()
    return total


def _cosine(gram: Tensor, one: int, other: int) -> float:
    length = float(gram[one, one] * gram[other, other]) ** 0.5
    return float(gram[one, other]) / length if length else 1.0


def _comparable(models: Sequence[Model]) -> list[dict[str, Tensor]]:
    """The states, classifiers by label; [] where the bodies are not of one shape."""
    if any(model.kind != "single" or isinstance(network(model), Model) for model in models):
        return []
    states = []
    reference = network(models[0]).state_dict()
    heads = set(classifier_keys(network(models[0])))
    for model in models:
        state = dict(network(model).state_dict())
        if any(key not in state or state[key].shape != tensor.shape
               for key, tensor in reference.items() if key not in heads):
            return []
        if set(model.classes) == set(models[0].classes) and model.classes != models[0].classes:
            order = torch.tensor([model.classes.index(name) for name in models[0].classes])
            state |= {key: state[key][order] for key in heads}
        states.append(state)
    return states


def _damaged(
    states: Sequence[Mapping[str, Tensor]], base: Sequence[Mapping[str, Tensor]]
) -> FusionError | None:
    """Why no weights can be fused, if some are no finite numbers."""
    if states:
        floating = [key for key, tensor in states[0].items() if tensor.is_floating_point()]
        try:
            want_finite("plan", states, base[0] if base else None, floating)
        except FusionError as error:
            return error
    return None


def _shared(models: Sequence[Model], states: Sequence[Any]) -> dict[str, bool]:
    def same(values: Sequence[Any]) -> bool:
        return all(value == values[0] for value in values)

    preprocessing = [next(model.each_member()).preprocessing for model in models]
    return {
        "architecture": same([architecture(model) for model in models]),
        "tensors": bool(states),
        "labels": same([set(model.classes) for model in models]),
        "image size": same([model.image_size for model in models]),
        "normalisation": same([(found.mean, found.std) if found else None
                               for found in preprocessing]),
    }


def _told(model: Model, name: str) -> dict[str, Any]:
    first = next(model.each_member())
    return {"name": name, "architecture": architecture(model),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "classes": len(model.classes), "image_size": model.image_size,
            "norms": first.norms if model.kind == "single" and norm_keys(first.net) else None,
            "source": dict(first.source)}


def _member_line(told: Mapping[str, Any]) -> str:
    norms = f", batch norm {told['norms']}" if told["norms"] else ""
    return (f"{told['name']}: {told['architecture']}, {told['parameters'] / 1e6:.1f} million "
            f"parameters, {told['classes']} classes, {told['image_size']} px{norms}.")


def _pair_line(pair: Pair) -> str:
    told = [f"weights {pair.cosine:.2f}"]
    told += [f"{name} {value:.2f}" for name, value in
             (("classifiers", pair.head_cosine), ("changes", pair.task_cosine))
             if value is not None]
    return f"{pair.members[0]} and {pair.members[1]}, cosines: {', '.join(told)}."


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "?")) else f"{text}."
