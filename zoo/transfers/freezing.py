"""Which parameters of a model's networks stay as they are."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import nn

from zoo.errors import OptionError
from zoo.fusion.depth import blocks
from zoo.member import Member
from zoo.model import Inner, Model
from zoo.names import suggest


def networks(model: Model) -> list[Member]:
    """The members that are networks, also those of models inside."""
    return [module for module in model.modules()
            if isinstance(module, Member) and not isinstance(module, Inner)]


def frozen_parameters(
    owner: str, model: Model, freeze: int | str | list[str] | None
) -> list[nn.Parameter]:
    """The parameters that an option `freeze` means, the classifiers' aside.

    freeze: so many leading blocks of each network, with what comes before them; or parts of the
    networks by name (`"layer1"`) or shell-style pattern (`"blocks.[0-3].*"`); with its place before
    it, of one member alone (`"members.0"`, `"members.1.layer1"`).
    Raises OptionError for more blocks than there are, or a pattern that matches nothing.
    """
    if freeze is None:
        return []
    if isinstance(freeze, int):
        found = [parameter for member in networks(model)
                 for parameter in _leading(owner, member, freeze)]
    else:
        patterns = [freeze] if isinstance(freeze, str) else freeze
        found = [parameter for pattern in patterns for parameter in _named(owner, model, pattern)]
    heads = {id(parameter) for parameter in model.head_parameters()}
    return [parameter for parameter in found if id(parameter) not in heads]


def _leading(owner: str, member: Member, count: int) -> list[nn.Parameter]:
    named = dict(member.net.named_parameters())
    block_of, total = blocks(named)
    if total == 0:
        raise OptionError(owner, f"the option 'freeze' is {count}, and the names in {member.name} "
                          "tell of no blocks; name the parts to freeze: "
                          f"{', '.join(_parts(member))}")
    if not 1 <= count <= total:
        raise OptionError(owner, f"the option 'freeze' is {count}, expected 1 to {total}, the "
                          f"blocks of {member.name}")
    return [parameter for name, parameter in named.items() if block_of[name] < count]


def _named(owner: str, model: Model, pattern: str) -> list[nn.Parameter]:
    members = networks(model)
    if pattern.startswith("members."):
        named = [(re.sub(r"(members\.\d+)\.net", r"\1", name), parameter)
                 for name, parameter in model.named_parameters()]
    else:
        named = [each for member in members for each in member.net.named_parameters()]
    found = [parameter for name, parameter in named
             if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if not found:
        steps = [name.split(".") for name, _ in named]
        near = suggest(pattern, list(dict.fromkeys(
            ".".join(each[:depth]) for each in steps for depth in range(1, len(each)))))
        parts = dict.fromkeys(part for member in members for part in _parts(member))
        hint = f"did you mean {near[0]!r}?" if near else f"their parts are {', '.join(parts)}"
        raise OptionError(owner, f"no parameter of the networks is called {pattern!r} or lies in "
                          f"a part of that name; {hint}")
    return found


def _parts(member: Member) -> list[str]:
    return [name for name, part in member.net.named_children()
            if any(True for _ in part.parameters())]
