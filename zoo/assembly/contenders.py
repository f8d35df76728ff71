"""Which fusions `auto` tries, in which order, and why not the others."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zoo.assembly.material import Material
from zoo.assembly.members import base_of
from zoo.assembly.plans import Verdict, plan
from zoo.assembly.trying import OF_KIND, Candidate, label
from zoo.errors import FusionError, OptionError, ZooError
from zoo.model import Model
from zoo.names import suggest
from zoo.options import options_of
from zoo.registry import find, list_fusions
from zoo.specs import FusionSpec


class Planned:
    """A fusion that is built when it is first tried: what it cannot do counts against it alone."""

    def __init__(self, spec: FusionSpec, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.name = label(spec, options)
        self.kind, self.strategy = spec.kind, spec.name
        self.options = options
        self._built: Candidate | None = None

    def built(self, material: Material) -> Candidate:
        if self._built is None:
            self._built = OF_KIND[self.spec.kind](material, self.spec, self.options)
        return self._built


def wanted(strategies: str | list[str] | None) -> set[str]:
    """The full names of the strategies that are asked for. Raises OptionError."""
    every = {name for name in list_fusions() if find(name, FusionSpec).kind != "choice"}
    if strategies is None:
        return every
    patterns = [strategies] if isinstance(strategies, str) else strategies
    found: set[str] = set()
    for pattern in patterns:
        matching = every.intersection(list_fusions(pattern))
        if not matching:
            near = suggest(pattern, [*every, *(name.partition("/")[2] for name in every)])
            hint = f"did you mean {near[0]!r}?" if near else "see zoo ls --type fusion"
            raise OptionError("zoo/auto", f"strategies has {pattern!r}, and no fusion is called "
                              f"so; {hint}")
        found |= matching
    if not found:
        raise OptionError("zoo/auto", "strategies is empty; leave it out to try all")
    return found


def knowing(
    models: Sequence[Model], classes: Sequence[str]
) -> tuple[list[int], tuple[str, ...]]:
    """The numbers of the members that know some of the data's classes, if together they know all;
    and the classes of a new head: those of the first member that knows all, or else the data's."""
    able = [number for number, model in enumerate(models) if _knows(model, classes)]
    every = {name for number in able for name in models[number].classes}
    if not every.issuperset(classes):
        return [], tuple(classes)
    whole = [models[number].classes for number in able
             if set(models[number].classes).issuperset(classes)]
    return able, whole[0] if whole else tuple(classes)


def _knows(model: Model, classes: Sequence[str]) -> bool:
    """That a pretrained network counts a thousand classes "0" to "999" says nothing of "7"."""
    counted = list(model.classes) == [str(number) for number in range(len(model.classes))]
    if counted and not model.recipe.keys() - {"fresh"}:
        return set(model.classes) == set(classes)
    return not set(model.classes).isdisjoint(classes)


def known_base(models: Sequence[Model]) -> Model | None:
    try:
        return base_of(models)
    except ZooError:  # strategies that need it are then not possible, and the report says so
        return None


def legal(
    models: Sequence[Model], able: Sequence[int], base: Model | None, wanted: set[str], *,
    chosen: bool,
) -> tuple[list[FusionSpec], dict[str, str]]:
    """The strategies to try, the most promising first, and why the others are not tried. chosen:
    the user named them."""
    verdicts = {verdict.strategy: verdict for verdict in plan(models, base=base, data=True).verdicts
                if verdict.strategy in wanted}
    if 2 <= len(able) < len(models):
        some = plan([models[number] for number in able], base=base, data=True)
        verdicts |= {verdict.strategy: verdict for verdict in some.verdicts
                     if verdict.strategy in wanted and verdict.kind != "features"}
    apart = any(verdict.outlook == "likely to hurt" for verdict in verdicts.values())
    specs, left_out = [], {}
    for name, verdict in verdicts.items():
        spec = find(name, FusionSpec)
        why = _unlikely(spec, verdict, len(able), apart=apart, chosen=chosen)
        if why:
            left_out[name] = why
        else:
            specs.append(spec)
    if not specs:
        told = "; ".join(f"{name}: {why}" for name, why in [*left_out.items()][:3])
        raise FusionError("zoo/auto", f"none of the strategies to try can fuse them ({told})",
                          "Leave strategies out to try all, and see zoo.plan")
    return specs, left_out


def _unlikely(
    spec: FusionSpec, verdict: Verdict, able: int, *, apart: bool, chosen: bool
) -> str:
    """Why a strategy is not tried; "" where it is."""
    if spec.kind != "features" and able < 2:
        return "fewer than two members have a head for the data's classes"
    if verdict.outlook in ("not possible", "likely to hurt"):
        return verdict.why
    if apart and not chosen and "graph" in spec.uses and spec.name != "zoo/rebasin":
        return "their weights lie apart; of what aligns them only zoo/rebasin is tried unasked"
    return ""


def in_turn(specs: Sequence[FusionSpec]) -> list[Planned]:
    """Each strategy as it is, kinds in turn so that few trials see all of them, and last those that
    need tokens or maps, which take another pass over the images; then each with one option
    changed."""
    specs = sorted(specs, key=lambda spec: spec.takes != "vectors")
    lines = [[Planned(spec, {}) for spec in specs if spec.kind == kind]
             for kind in ("outputs", "features", "weights")]
    changed = [[Planned(spec, each) for spec in specs if spec.kind == kind
                for each in settings_of(spec)] for kind in ("outputs", "features", "weights")]
    return [one for group in (lines, changed) for turn in itertools.zip_longest(*group)
            for one in turn if one is not None]


def settings_of(spec: FusionSpec) -> Iterator[dict[str, Any]]:
    """One option at a time away from its default: a flag turned, another word of a Literal, half
    and twice a number."""
    for option in options_of(spec):
        try:
            default = ast.literal_eval(option.default)
            words = ast.literal_eval(option.type.removeprefix("Literal")) \
                if option.type.startswith("Literal[") else []
        except (ValueError, SyntaxError):
            continue
        if isinstance(default, bool):
            yield {option.name: not default}
        elif isinstance(default, (int, float)) and default:
            for value in (default / 2, default * 2):
                if isinstance(default, float):
                    yield {option.name: value}
                elif int(value) != default and int(value) > 0:
                    yield {option.name: int(value)}
        for word in words:
            if word != default:
                yield {option.name: word}
