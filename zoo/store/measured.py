"""What was measured of a model that is saved, and of others beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zoo.errors import OptionError
from zoo.model import Model
from zoo.store.private import public

if TYPE_CHECKING:
    from zoo.evaluation import Evaluation

_OWN = ("fused", "model")


@dataclass(frozen=True)
class Measured:
    """The measures of several models on the same images, as JSON values by name, in the order in
    which they are told. own: the name of the model that is saved, None where nothing was
    measured."""

    by_name: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    own: str | None = None

    @classmethod
    def of(cls, model: Model, evaluations: Mapping[str, Evaluation]) -> Measured:
        """Raises OptionError for evaluations that cannot be this model's, or cannot be compared."""
        if not evaluations:
            return cls()
        from zoo.evaluation import Evaluation

        for name, each in evaluations.items():
            if not isinstance(each, Evaluation):
                raise OptionError("save", f"evaluations[{name!r}] is a {type(each).__name__}, "
                                  "expected what zoo.evaluate gives")
        own = next((name for name in _OWN if name in evaluations), None)
        if own is None:
            raise OptionError("save", f"evaluations has {', '.join(map(repr, evaluations))} and "
                              "nothing of the model that is saved; put that under 'fused' or "
                              "'model'")
        told = evaluations[own]
        held = sum(parameter.numel() for parameter in model.parameters())
        if len(told.confusion) != len(model.classes) or told.parameters != held:
            raise OptionError("save", f"evaluations[{own!r}] is of a model with "
                              f"{len(told.confusion)} classes and {told.parameters:,} parameters, "
                              f"and this one has {len(model.classes)} and {held:,}; measure the "
                              "model that is saved")
        other = next((name for name, each in evaluations.items()
                      if (each.n, each.data) != (told.n, told.data)), None)
        if other is not None:
            raise OptionError("save", f"evaluations[{other!r}] is of {evaluations[other].n:,} "
                              f"images and {own!r} of {told.n:,} others; measure all on the same")
        by_name: dict[str, dict[str, Any]] = {}
        for name, each in evaluations.items():
            shown = public(name)
            by_name[f"{shown} ({len(by_name) + 1})" if shown in by_name else shown] = each.as_dict()
        return cls(by_name, own)
