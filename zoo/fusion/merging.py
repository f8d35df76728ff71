"""The core around the weight strategies, for states in memory: it checks, keeps apart what must
not be fused, calls the strategy in float32 and casts back once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zoo.errors import FusionError, ShapeMismatch
from zoo.fusion.norms import MEAN, VARIANCE, pooled_variance
from zoo.fusion.planning import check_count, check_shapes
from zoo.fusion.precision import widened
from zoo.fusion.weighting import Weight, resolve_weights
from zoo.fusion.weights.average import average
from zoo.fusion.weights.task_arithmetic import wanted_base
from zoo.registry import resolve
from zoo.specs import SCOPES, FusionSpec

State: TypeAlias = Mapping[str, Tensor]

# A strategy's tensors and keywords for one call.
Call: TypeAlias = tuple[list[Tensor], dict[str, Any]]

MOST_PASSES = 8


@torch.no_grad()
def merge_states(
    states: Sequence[State],
    strategy: Callable[..., Any],
    *,
    spec: FusionSpec,
    base: State | None = None,
    weight: Weight | None = None,
    options: Mapping[str, Any] | None = None,
    skip: Collection[str] = (),
    averaged: Collection[str] = (),
    norm_keys: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """One state of several, by a weight strategy.

    Floating-point tensors go through the strategy in float32 (float64 stays) on the first
    member's device and come back in their dtype. Integer and bool tensors are copied from the
    first member. Batch norm's running statistics are pooled, with the between-member term; of a
    strategy for a single member they lie on the same line as the weights. Tensors that share
    storage in every member are fused once and share it again. No input is changed or shared.

    states: one per member, same keys, shapes and dtypes. strategy: what `spec.build` names.
    base: a state with (at least) the same keys, for a strategy that uses one. weight: see
    `resolve_weights`. options: all of the strategy's own. skip: keys that are copied from the
    first member. averaged: keys that are averaged instead, such as heads that the base does not
    have. norm_keys: keys of running means and variances; None finds them by name.

    Raises FusionError for a wrong number of members or a missing base, ShapeMismatch naming the
    first tensor that differs, OptionError for a weight that fits nothing.
    """
    check_count(spec, len(states))
    base = wanted_base(spec.name, base) if "base" in spec.uses else None
    if norm_keys is None:
        norm_keys = {key for key in states[0] if key.rpartition(".")[2] in (MEAN, VARIANCE)}
    if spec.members == (1, 1):
        norm_keys = ()
    floating = [key for key, tensor in states[0].items()
                if tensor.is_floating_point() and key not in skip]
    fused = [key for key in floating if key not in averaged and key not in norm_keys]
    _check(spec.name, states, base, fused)
    weights = resolve_weights(weight, floating, len(states), spec.name)

    first_of = _shared(states)
    own = {key: weights[key] for key in fused if first_of[key] == key}
    merged = _fused(strategy, spec, states, base, own, options or {}) if own else {}
    for key in floating:
        if key in averaged:
            merged[key] = average([state[key] for state in states], base=None, key=key,
                                  weight=_shares(weights[key]))
        elif key in norm_keys:
            merged[key] = _pooled(states, key, _shares(weights[key]))

    result: dict[str, Tensor] = {}
    for key, like in states[0].items():
        if first_of[key] in result:
            result[key] = result[first_of[key]]
        else:
            result[key] = merged.get(key, like).to(like.device, like.dtype, copy=True).detach()
    return result


def _check(
    strategy: str, states: Sequence[State], base: State | None, fused: Iterable[str]
) -> None:
    names = [f"member {number}" for number in range(1, len(states) + 1)]
    shapes = [{key: tuple(tensor.shape) for key, tensor in state.items()} for state in states]
    check_shapes(strategy, names, shapes)
    for key, tensor in states[0].items():
        for name, state in zip(names, states, strict=True):
            if state[key].dtype != tensor.dtype:
                raise ShapeMismatch(strategy, key, f"is {tensor.dtype} in {names[0]} and "
                                    f"{state[key].dtype} in {name}", "Convert them to one dtype")
    if base is not None:
        wanted = {key: shapes[0][key] for key in fused}
        found = {key: tuple(base[key].shape) for key in wanted if key in base}
        check_shapes(strategy, [names[0], "the base"], [wanted, found],
                     "Pass the base that the members started from")


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


def _shares(weight: Sequence[float]) -> list[float]:
    """Weights of a mixture: a member that is subtracted has no part in it."""
    shares = [max(share, 0.0) for share in weight]
    return shares if any(shares) else [1.0] * len(shares)


def _pooled(states: Sequence[State], key: str, shares: Sequence[float]) -> Tensor:
    tensors = [state[key] for state in states]
    mean = key.removesuffix(VARIANCE) + MEAN
    if key.endswith(VARIANCE) and mean in states[0]:
        return pooled_variance([state[mean] for state in states], tensors, shares)
    return average(tensors, base=None, key=key, weight=shares)


def _fused(
    strategy: Callable[..., Any],
    spec: FusionSpec,
    states: Sequence[State],
    base: State | None,
    weights: Mapping[str, Sequence[float]],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """The strategy's own part, on the tensors that `weights` names."""
    scope = _scope(spec, options)
    call = _accepting(strategy)
    if scope == "model":
        return _fused_whole(call, spec, states, base, weights, options)

    def calls() -> Iterator[Call]:
        for key, weight in weights.items():
            like = states[0][key]
            tensors = [_wide(state[key], like) for state in states]
            start = None if base is None else _wide(base[key], like)
            keywords = {"base": start, "key": key, "weight": weight, **options}
            if scope == "slice":
                tensors = [tensor.reshape(-1) for tensor in tensors]
                keywords |= {"base": None if start is None else start.reshape(-1), "offset": 0,
                             "shape": tuple(like.shape)}
            yield tensors, keywords

    measured = {"measured": _measured(spec, calls)} if spec.measure else {}
    merged: dict[str, Tensor] = {}
    for tensors, keywords in calls():
        key = keywords["key"]
        result = call(tensors, **keywords, **measured)
        if result.shape != tensors[0].shape:
            raise ShapeMismatch(spec.name, key, f"became {list(result.shape)}, from "
                                f"{list(tensors[0].shape)}", "This is a defect of the strategy")
        merged[key] = result.reshape(states[0][key].shape)
    return merged


def _fused_whole(
    call: Callable[..., Any],
    spec: FusionSpec,
    states: Sequence[State],
    base: State | None,
    weights: Mapping[str, Sequence[float]],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    def wide(state: State) -> State:
        return {key: _wide(state[key], states[0][key]) for key in weights}

    merged: dict[str, Tensor] = dict(call(
        [wide(state) for state in states], base=None if base is None else wide(base),
        weights=weights, **options))
    wanted = {key: tuple(states[0][key].shape) for key in weights}
    found = {key: tuple(tensor.shape) for key, tensor in merged.items()}
    check_shapes(spec.name, ["the members", "its result"], [wanted, found],
                 "This is a defect of the strategy")
    return merged


def _measured(spec: FusionSpec, calls: Callable[[], Iterator[Call]]) -> tuple[Any, ...]:
    """What the passes before the merge add up to, one item per pass.

    A pass calls `measure` for every tensor and adds up its answers over the model; the next
    pass gets the sums so far. They end when `measure` answers None.
    """
    measure = _accepting(resolve(spec.measure, spec.name))
    sums: tuple[Any, ...] = ()
    for _ in range(MOST_PASSES):
        whole: Any = None
        for tensors, keywords in calls():
            part = measure(tensors, **keywords, measured=sums)
            if part is None:
                return sums
            whole = part if whole is None else whole + part
        sums = (*sums, whole)
    raise FusionError(spec.name, f"after {MOST_PASSES} passes it still measures",
                      "Its measure must return None once it has seen enough")


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    return widened(tensor.detach().to(like.device))


def _scope(spec: FusionSpec, options: Mapping[str, Any]) -> str:
    """What one call sees; where several options have a say, the widest."""
    if isinstance(spec.scope, str):
        return spec.scope
    scopes = [values[str(options[option])] for option, values in spec.scope.items()]
    return max(scopes, key=SCOPES.index)


def _accepting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the keywords that it does not take: a plugin may take fewer than the
    core gives."""
    taken = inspect.signature(function).parameters

    def call(tensors: Any, **keywords: Any) -> Any:
        return function(tensors, **{name: keywords[name] for name in keywords if name in taken})

    return call
