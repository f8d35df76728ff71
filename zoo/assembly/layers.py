"""Which layers of its members a fusion of features gets, and how they are pooled."""

from __future__ import annotations

from collections.abc import Sequence

from zoo.backbones.layers import POOLS, want_layers
from zoo.errors import OptionError
from zoo.member import Member
from zoo.model import Inner
from zoo.specs import FusionSpec

Layer = str | Sequence[str | Sequence[str] | None]
Pool = str | Sequence[str | None]
Choice = tuple[tuple[str, ...], str | None]  # layers by name, pool


def choices_of(
    spec: FusionSpec, members: int, layer: Layer | None, pool: Pool | None
) -> list[Choice]:
    """The choice for each member, of what `zoo.fuse` is given. Raises OptionError for what is no
    choice, or not one for each member, and for a fusion that is not of features."""
    for name, given in (("layer", layer), ("pool", pool)):
        if given is not None and spec.kind != "features":
            raise OptionError(spec.name, f"{name} belongs to fusions of features; leave it out")
    layers = [_layers(one) for one in _one_each("layer", layer, members)]
    pools = [_pool(one) for one in _one_each("pool", pool, members)]
    return list(zip(layers, pools, strict=True))


def choose(member: Member, choice: Choice) -> None:
    """Let a member give these layers, pooled so. Raises OptionError for one it does not have."""
    layers, pool = choice
    if isinstance(member, Inner):
        if layers or pool:
            raise OptionError("layer" if layers else "pool", f"{member.name} is a fused model and "
                              "gives one vector; give it null (None)")
        return
    want_layers(member.net, member.name, layers)
    member.layers, member.pool = layers, pool


def _one_each(name: str, given: object, members: int) -> Sequence[object]:
    if given is None or isinstance(given, str):
        return [given] * members
    if not isinstance(given, Sequence):
        raise OptionError("fuse", f"{name} is {given!r}, expected a name, or a list with one for "
                          "each member")
    if len(given) != members:
        raise OptionError("fuse", f"{name} has {len(given)} entries for {members} members; give "
                          "one for each, null (None) for the default, or one name for all")
    return given


def _layers(given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    layers = (given,) if isinstance(given, str) else given
    if not isinstance(layers, Sequence) or not layers or not all(
            isinstance(one, str) and one for one in layers):
        raise OptionError("fuse", f"layer has {given!r} for a member, expected a layer's name, "
                          "a list of names, or null (None)")
    return tuple(layers)


def _pool(given: object) -> str | None:
    if given == "token":
        return "cls"
    if given is not None and given not in POOLS:
        raise OptionError("fuse", f"pool is {given!r}, expected "
                          f"{', '.join(map(repr, POOLS))} or null (None)")
    return given if isinstance(given, str) else None
