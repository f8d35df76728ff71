"""The core around the weight strategies: it checks, keeps apart what must not be fused, lets the
strategy compute in float32, and casts back once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.errors import FusionError
from zoo.fusion.norms import MEAN, VARIANCE, pooled_variance
from zoo.fusion.planning import check_count, check_dtypes, check_shapes
from zoo.fusion.precision import doubled
from zoo.fusion.stream import Merge, State, run
from zoo.fusion.weighting import Weight, resolve_options, resolve_weights
from zoo.fusion.weights.average import average
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.specs import FusionSpec


@torch.no_grad()
def merge_states(
    states: Sequence[State],
    strategy: Callable[..., Any],
    *,
    spec: FusionSpec,
    base: State | None = None,
    weight: Weight | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    given: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
    averaged: Collection[str] = (),
    norm_keys: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """One state of several, by a weight strategy.

    Floating-point tensors go through the strategy in float32 (float64 stays) on the first
    member's device and come back in their dtype. Integer and bool tensors are copied from the
    first member, and so are those with infinities, as masks and bounds have, that are the same in
    all. Batch norm's running statistics are pooled, with the between-member term; of a
    strategy for a single member they lie on the same line as the weights, and a strategy of scope
    "model" may give its own. Tensors that share storage in every member are fused once and share
    it again. No input is changed or shared.

    states: one per member, same keys, shapes and dtypes. strategy: what `spec.build` names.
    base: a state with (at least) the same keys, for a strategy that uses one. weight: see
    `resolve_weights`. options: all of the strategy's own, see `resolve_options`. seed: of its
    random numbers. given: further keywords for strategies that take them. skip: keys that are
    copied from the first member. averaged: keys that are averaged instead, such as heads that the
    base does not have.
    norm_keys: keys of running means and variances; None finds them by name.

    Raises FusionError for a wrong number of members, a missing base or a tensor with values that
    are not finite, ShapeMismatch naming the first tensor that differs, OptionError for a weight
    that fits nothing.
    """
    parts = sort_tensors(spec, states, base, skip=skip, averaged=averaged, norm_keys=norm_keys)
    weights = resolve_weights(weight, parts.floating, len(states), spec.name)
    settings = resolve_options(spec, strategy, options or {}, parts.floating, len(states),
                               fused=parts.fused)
    parts = parts.without(want_finite(spec.name, states, base, parts.floating))
    first_of = _shared(states)
    own = {key: weights[key] for key in parts.fused if first_of[key] == key}
    result = {key: torch.empty_like(states[0][key].detach(),
                                    memory_format=torch.contiguous_format) for key in own}

    def write(key: str, start: int, part: Tensor) -> None:
        place = result[key].view(-1)[start:start + part.numel()]
        want_finite_result(spec.name, key, place.copy_(part), states, base)

    merge = Merge(strategy, spec, states, base if "base" in spec.uses | spec.can_use else None,
                  own, settings.common, seed, given or {}, settings.own)
    extra = run(merge, write)
    for key in (*parts.averaged, *parts.norms):
        value = extra[key] if key in extra else (
            average([state[key] for state in states], base=None, key=key,
                    weight=mixture(weights[key]))
            if key in parts.averaged else pooled(states, key, mixture(weights[key])))
        result[key] = value.to(states[0][key].device, states[0][key].dtype, copy=True)
    for key, like in states[0].items():
        if first_of[key] in result:
            result[key] = result[first_of[key]]
        elif key not in result:
            result[key] = like.detach().clone()
    return {key: result[key] for key in states[0]}


@dataclass(frozen=True, slots=True)
class Parts:
    """What becomes of the tensors. fused: the strategy's. averaged, norms: as they say; all other
    tensors are copied from the first member."""

    fused: tuple[str, ...]
    averaged: tuple[str, ...]
    norms: tuple[str, ...]

    @property
    def floating(self) -> tuple[str, ...]:
        return (*self.fused, *self.averaged, *self.norms)

    def without(self, keys: Collection[str]) -> Parts:
        """The same, with these tensors copied."""
        return Parts(*(tuple(key for key in part if key not in keys)
                       for part in (self.fused, self.averaged, self.norms)))


def sort_tensors(
    spec: FusionSpec,
    states: Sequence[State],
    base: State | None,
    *,
    skip: Collection[str] = (),
    averaged: Collection[str] = (),
    norm_keys: Collection[str] | None = None,
) -> Parts:
    """Check the states against each other and the base, and sort their tensors. Arguments and
    errors: see `merge_states`."""
    check_count(spec, len(states))
    if "base" in spec.uses:
        wanted_base(spec.name, base)
    floating = [key for key, tensor in states[0].items()
                if tensor.is_floating_point() and key not in skip]
    parts = sort_keys(spec, floating, averaged, norm_keys)
    _check(spec.name, states, base, parts.fused)
    return parts


def sort_keys(
    spec: FusionSpec,
    floating: Collection[str],
    averaged: Collection[str] = (),
    norm_keys: Collection[str] | None = None,
) -> Parts:
    """What becomes of floating-point tensors. averaged, norm_keys: see `merge_states`."""
    if norm_keys is None:
        norm_keys = {key for key in floating if key.rpartition(".")[2] in (MEAN, VARIANCE)}
    if spec.members == (1, 1):
        norm_keys = ()
    return Parts(
        tuple(key for key in floating if key not in averaged and key not in norm_keys),
        tuple(key for key in floating if key in averaged),
        tuple(key for key in floating if key in norm_keys and key not in averaged))


def _check(
    strategy: str, states: Sequence[State], base: State | None, fused: Iterable[str]
) -> None:
    names = [f"member {number}" for number in range(1, len(states) + 1)]
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in states]
    check_shapes(strategy, names, shapes)
    check_dtypes(strategy, names, [{key: str(tensor.dtype) for key, tensor in state.items()}
                                   for state in states])
    if base is not None:
        wanted = {key: shapes[0][key] for key in fused}
        found = {key: tuple(base[key].shape) for key in wanted if key in base}
        check_shapes(strategy, [names[0], "the base"], [wanted, found],
                     "Pass the base that the members started from")


def want_finite(
    strategy: str, states: Sequence[State], base: State | None, keys: Iterable[str]
) -> set[str]:
    """Those of these keys whose tensors have infinities and are the same in all states: masks, or
    the bounds of a clamp, and no weights.

    Raises FusionError naming the first other tensor that has values which are no finite numbers, in
    a member or the base: the result would have them too, or hide them.
    """
    named = [(f"member {number}", state) for number, state in enumerate(states, 1)]
    if base is not None:
        named.append(("the base", base))
    fixed = set()
    for key in keys:
        there = [(name, state[key]) for name, state in named if key in state]
        name = next((name for name, tensor in there if not _finite(tensor)), None)
        if name is None:
            continue
        first = doubled(there[0][1])
        if not all(torch.equal(doubled(tensor).to(first.device), first) for _, tensor in there):
            raise FusionError(strategy, f"tensor {key!r} of {name} has values that are not "
                              "finite (NaN or infinity)", f"Leave {name} out")
        fixed.add(key)
    return fixed


def want_finite_result(
    strategy: str, key: str, part: Tensor, states: Sequence[State], base: State | None
) -> None:
    """Raises FusionError when a part of the result is not finite, naming the input that is not."""
    if not _finite(part):
        want_finite(strategy, states, base, [key])
        if part.isnan().any():
            raise FusionError(strategy, f"it made values of tensor {key!r} that are no numbers "
                              "(NaN)", "Its options may be extreme, or it has a defect")
        raise FusionError(strategy, f"in the result, tensor {key!r} has values beyond the range of "
                          f"{part.dtype}", "Take smaller weights or scales, or a wider dtype")


def _finite(tensor: Tensor) -> bool:
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    # A sum is fast, and finite only where all values are.
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())


def _shared(states: Sequence[State]) -> dict[str, str]:
    """Each key's first key with the same storage in every member: tied weights."""
    first_at: dict[tuple[Any, ...], str] = {}
    return {
        key: first_at.setdefault(tuple(map(_place, (state[key] for state in states))), key)
        for key in states[0]
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype,
            tensor.shape, tensor.stride())


def mixture(weight: Sequence[float]) -> list[float]:
    """Weights of a mixture: a member that is subtracted has no part in it."""
    shares = [max(share, 0.0) for share in weight]
    return shares if any(shares) else [1.0] * len(shares)


def pooled(states: Sequence[State], key: str, shares: Sequence[float]) -> Tensor:
    """A running mean or variance of the members' mixture."""
    tensors = [state[key] for state in states]
    mean = key.removesuffix(VARIANCE) + MEAN
    if key.endswith(VARIANCE) and mean in states[0]:
        return pooled_variance([state[mean] for state in states], tensors, shares)
    return average(tensors, base=None, key=key, weight=shares)
