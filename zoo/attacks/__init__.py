"""Attacks by name: `attack(model, images, labels) -> adversarial images`, one method a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from zoo.errors import UnknownName
from zoo.names import suggest
from zoo.options import accepts, checked
from zoo.registry import resolve
from zoo.specs import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

Attack: TypeAlias = "Callable[[nn.Module, Tensor, Tensor], Tensor]"

# Where each attack lives; imported when it is used, so that names can be listed without torch.
ATTACKS: Mapping[str, str] = MappingProxyType({
    "fgsm": "zoo.attacks.fgsm:fgsm",
    "pgd": "zoo.attacks.pgd:pgd",
})


def resolve_attack(
    name: str, options: Mapping[str, object] | None = None, *, seed: int = 0
) -> Attack:
    """The attack of this name with its options bound: `(model, images, labels) -> images`.

    options: the attack's own, `{"eps": 0.1, "steps": 40}`. seed: for an attack that draws.

    Raises UnknownName with the nearest spellings, and OptionError for an unknown option, a
    missing one, or a value of the wrong type.
    """
    if name not in ATTACKS:
        near = suggest(name, ATTACKS)
        raise UnknownName(name, "attack", near, "" if near else f"there are {', '.join(ATTACKS)}")
    attack = resolve(ATTACKS[name], name)
    values = checked(Spec(name=name, build=ATTACKS[name]), options or {})
    if accepts(attack, "seed"):
        values["seed"] = seed
    return partial(attack, **values)
