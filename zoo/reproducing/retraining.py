"""What a saved model was trained by, done again: the same images, the same teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zoo.errors import ProvenanceError
from zoo.model import Model
from zoo.registry import find
from zoo.specs import TransferSpec
from zoo.tensors.digest import digest
from zoo.training import transfer


@dataclass(frozen=True)
class Images:
    """What a user has of the images: those that it was trained or fitted on, those that its best
    epoch was chosen on, and those without labels that it adapted to. None of what is not given."""

    data: Any = None
    val: Any = None
    unlabelled: Any = None

    def want_used(self, reference: str, transfers: Sequence[Mapping[str, Any]]) -> None:
        """Raises ProvenanceError for images that no training of it looked at."""
        for name, given, used, problem in (
            ("val", self.val, _on_others, "chose its best epoch on other images"),
            ("unlabelled", self.unlabelled, _adapts, "adapted to unlabelled images"),
        ):
            if given is not None and not any(map(used, transfers)):
                raise ProvenanceError(reference, f"no training of it {problem}; leave {name} out")


def why_not_trained(transfers: Sequence[Mapping[str, Any]], images: Images) -> str:
    """Why the training cannot be done again; `""` where it can, or there was none."""
    if not transfers:
        return ""
    for each in transfers:
        if not all(isinstance(teacher, Mapping) for teacher in each.get("teachers") or ()):
            return f"{each['method']} learned from teachers, which are not published with the model"
    wanted = [("--data train.csv (data=…)", images.data is None),
              ("--val val.csv (val=…)", images.val is None and any(map(_on_others, transfers))),
              ("--unlabelled photos (unlabelled=…)",
               images.unlabelled is None and any(map(_adapts, transfers)))]
    missing = ", ".join(option for option, lacks in wanted if lacks)
    what = ", ".join(map(_in_words, transfers))
    return missing and (f"it was trained ({what}); pass the same data to check what that changed: "
                        f"{missing}")


def teachers_of(
    transfers: Sequence[Mapping[str, Any]], done: int,
    found: Callable[[Mapping[str, Any], str], Model],
) -> list[list[Model]]:
    """The teachers of each transfer but those that are done. found: gives one, from what is told of
    it and its label, which counts on from one transfer to the next: `teacher1`, `teacher2`, …"""
    teachers: list[list[Model]] = []
    count = 0
    for number, each in enumerate(transfers):
        told = each.get("teachers") or ()
        if number >= done:
            teachers.append([found(teacher, f"teacher{count + place}")
                             for place, teacher in enumerate(told, 1)])
        count += len(told)
    return teachers


def trained_before(
    model: Model, transfers: Sequence[Mapping[str, Any]], notes: list[str]
) -> int:
    """How many of the transfers this model has behind it: a source from the Hub may have been
    trained before it was published. notes: gets that some are done, or that none of them began with
    these weights."""
    if not transfers:
        return 0
    own = digest(model.state_dict())
    began = [each.get("started_from") for each in transfers]
    done = began.index(own) if own in began else 0
    if done:
        notes.append(f"{done} of its {len(began)} trainings were before its source was published, "
                     "and are not done again")
    elif began[0] not in (None, own):
        hint = "" if model.fusion else "; if you have the model as it was: --source 1=PATH"
        notes.append(f"its training begins with other weights than then{hint}")
    return done


def train(
    model: Model, transfers: Sequence[Mapping[str, Any]], teachers: Sequence[Sequence[Model]],
    images: Images, notes: list[str],
) -> None:
    """Train a model as it was trained, in place. notes: gets what may explain a difference."""
    for each, own in zip(transfers, teachers, strict=True):
        spec = find(str(each["method"]), TransferSpec)
        transfer(model, images.data, spec.name,
                 val=images.val if _on_others(each) else each.get("val"),
                 unlabelled=images.unlabelled if _adapts(each) else None,
                 teachers=[teacher.to(model.device) for teacher in own],
                 activation=each.get("activation"), **each["settings"], **each["options"])
        now = model.recipe["transfers"][-1]
        compare_data(each, now, notes)
        for role in ("val", "unlabelled"):
            if isinstance(each.get(role), Mapping):
                compare_data(each[role], now.get(role), notes, role)


def compare_data(then: Any, now: Any, notes: list[str], role: str = "") -> None:
    """Note where the images are not those that they were."""
    if then and now and then.get("data") not in (None, now.get("data")):
        notes.append(
            f"the data{role and f' for {role}'} may not be the same: their fingerprint is "
            f"{now.get('data')} and was {then.get('data')} (the places and times of files are part "
            "of it)")


def _in_words(each: Mapping[str, Any]) -> str:
    told = f"{each['method']} on {each['images']} images"
    return f"{told} and {each['unlabelled'].get('images')} unlabelled ones" if _adapts(each) \
        else told


def _on_others(each: Mapping[str, Any]) -> bool:
    return isinstance(each.get("val"), Mapping)


def _adapts(each: Mapping[str, Any]) -> bool:
    return isinstance(each.get("unlabelled"), Mapping)
