"""`auto`'s choice made again on the same images, and its ranking compared with the one that was
saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from zoo.assembly import fuse
from zoo.errors import ProvenanceError
from zoo.model import Model
from zoo.reproducing.comparing import Choice
from zoo.reproducing.retraining import compare_data
from zoo.store import network
from zoo.tensors.digest import digest

_ASKED = ("folds", "errors", "penalty", "penalty_on", "budget", "trials")


def why_not_chosen(auto: Mapping[str, Any]) -> str:
    """Why the choice cannot be made again, whatever is given; `""` where it can."""
    return "" if "asked" in auto else ("what was asked of it beside trials and folds is not "
                                       "recorded by the version that made it")


def want_choice(reference: str, auto: Mapping[str, Any] | None, data: Any) -> None:
    """Raises ProvenanceError where a choice is to be made again and cannot be."""
    problem = ("auto did not choose it; leave choice out" if not auto else
               (why_not_chosen(auto) and f"the choice cannot be made again: {why_not_chosen(auto)}")
               or (data is None and "auto chose on images; pass the same: --data val.csv (data=…)"))
    if problem:
        raise ProvenanceError(reference, problem)


def number_of(saved: Model, auto: Mapping[str, Any]) -> int | None:
    """Which of the members was chosen, and left as it was; None where it was none."""
    own = digest(network(saved).state_dict())
    return next((number for number, told in enumerate(auto.get("sources") or ())
                 if told["state_sha256"] == own), None)


def choose_again(
    auto: Mapping[str, Any], models: Sequence[Model], base: Model | None, data: Any,
    device: torch.device, tolerance: float, notes: list[str],
) -> Choice:
    """Ask `auto` for the same once more.

    auto: what was recorded of the choice. models: its members. tolerance: largest difference of a
    candidate's two accuracies, and of its two NLLs as a share of the first.
    notes: gets what may explain a difference.
    """
    asked = {key: auto[key] for key in _ASKED} | dict(auto["asked"])
    again = fuse(list(models), "auto", base=base, data=data, device=device, seed=int(auto["seed"]),
                 **{key: value for key, value in asked.items() if value is not None})
    now = again.recipe["auto"]
    compare_data(auto, now, notes, "auto")
    rows = [{row["name"]: row for row in each["ranking"]} for each in (auto, now)]
    uncertain = tuple(_uncertain(auto, now))
    both = [(rows[0][name], rows[1][name]) for name in rows[0] if name in rows[1]]
    same = [pair for pair in both if _work(pair[0]) == _work(pair[1])]
    differing = [problem for pair in (same if uncertain else both)
                 if (problem := _differs(*pair, tolerance))]
    return Choice(
        then=str(auto["chosen"]), now=str(now["chosen"]), compared=len(same),
        differing=tuple(differing), alone=tuple(sorted(rows[0].keys() ^ rows[1].keys())),
        uncertain=uncertain)


def _uncertain(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What else than the seed decides which candidate is chosen."""
    if then["budget"] is not None:
        yield (f"it had {then['budget']:g} seconds, and how many candidates are tried in them "
               "depends on the machine")
    if then["penalty"] and then["penalty_on"] == "latency":
        yield "latency is measured anew"
    changed = sorted(_strategies(then) ^ _strategies(now))
    if changed and then["asked"]["strategies"] is None:
        yield f"all strategies were asked for, and these are not there both times: {_few(changed)}"


def _strategies(auto: Mapping[str, Any]) -> set[str]:
    return {row["strategy"] for row in auto["ranking"] if row["strategy"]} | set(auto["not_tried"])


def _differs(then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> str:
    """How a candidate came out otherwise; "" where it did not."""
    name = then["name"]
    if then["error"] is not None or now["error"] is not None:
        if then["error"] is not None and now["error"] is not None:
            return ""
        failed, when = (then, "then") if then["error"] is not None else (now, "now")
        return f"{name} failed {when} only: {failed['error']}"
    if _work(then) != _work(now):
        return f"{name} was tried on {_work(then)} then and on {_work(now)} now"
    if abs(then["accuracy"] - now["accuracy"]) > tolerance:
        return (f"{name} had {then['accuracy']:.2%} right of {then['images']:,} images then and "
                f"{now['accuracy']:.2%} now")
    if abs(then["nll"] - now["nll"]) > tolerance * abs(then["nll"]):
        return f"{name} had an NLL of {then['nll']:.6g} then and {now['nll']:.6g} now"
    return ""


def _work(row: Mapping[str, Any]) -> str:
    """How much a candidate was tried with."""
    return f"{row.get('images', 0):,} images in {row.get('epochs', 0)} epochs"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")
