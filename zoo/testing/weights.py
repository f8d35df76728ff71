"""Checks of fusions of weights, with their default options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zoo.fusion.merging import merge_states
from zoo.fusion.stream import Merge, run
from zoo.fusion.weighting import resolve_options
from zoo.options import checked
from zoo.registry import load
from zoo.specs import FusionSpec
from zoo.testing.devices import devices
from zoo.testing.fusions import count, fused_models_save_and_load
from zoo.testing.network import given, state_of
from zoo.testing.options import want_errors_that_name

_TOLERANCE = 1e-5
# Elements of one call in the check of cuts, such that every tensor of the network is cut unevenly.
_PIECE = 7


def inputs_stay_as_they_are(spec: FusionSpec) -> None:
    """Fusing changes none of its input tensors."""
    states, base = _states(spec), state_of(99)
    before = [{key: tensor.clone() for key, tensor in state.items()} for state in (*states, base)]
    _merge(spec, states, base)
    for old, new in zip(before, (*states, base), strict=True):
        for key in old:
            assert torch.equal(old[key], new[key]), (
                f"{spec.name} changed its input tensor {key!r}; work on a copy, without in-place "
                "operations on what you are given")


def keys_shapes_and_dtypes_are_kept(spec: FusionSpec) -> None:
    """The result has the members' keys, shapes and dtypes, in float32, float16 and bfloat16."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        states = [_cast(state, dtype) for state in _states(spec)]
        merged = _merge(spec, states, _cast(state_of(99), dtype))
        assert merged.keys() == states[0].keys(), (
            f"{spec.name} gave the keys {sorted(merged)}, expected {sorted(states[0])}")
        for key, tensor in merged.items():
            like = states[0][key]
            assert tensor.shape == like.shape, (
                f"{spec.name} gave {key!r} the shape {list(tensor.shape)}, "
                f"expected {list(like.shape)}")
            assert tensor.dtype == like.dtype, (
                f"{spec.name} gave {key!r} the dtype {tensor.dtype}, expected {like.dtype}")


def integer_buffers_are_copied(spec: FusionSpec) -> None:
    """Counters come from the first member; a mean of counters is no counter."""
    merged = _merge(spec, _states(spec), state_of(99))
    counter = "bn.num_batches_tracked"
    assert torch.equal(merged[counter], _states(spec)[0][counter]), (
        f"{spec.name} changed an integer buffer; with scope='model' copy what is not floating")


def same_seed_gives_same_bytes(spec: FusionSpec) -> None:
    """Twice the same fusion gives the same bytes, whatever torch's global generator says."""
    results = []
    for global_seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            results.append(_merge(spec, _states(spec), state_of(99)))
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), (
            f"{spec.name} gave other bytes for {key!r} the second time; draw random numbers from "
            "the seed, the key and the offset, never from torch's global generator")


def copies_of_a_model_give_it_back(spec: FusionSpec) -> None:
    """Where the spec says idempotent, fusing k copies of a model returns the model."""
    if not spec.idempotent:
        return
    one = state_of(0)
    merged = _merge(spec, [one] * count(spec), state_of(99))
    _want_close(spec, merged, one, "fusing copies of one model did not give it back; say "
                "idempotent=False in the spec if it is not meant to")


def order_does_not_matter(spec: FusionSpec) -> None:
    """Where the spec says symmetric, the order of the members does not change the result."""
    if not spec.symmetric:
        return
    states = _states(spec)
    one, other = (_merge(spec, order, state_of(99)) for order in (states, states[::-1]))
    del one["bn.num_batches_tracked"], other["bn.num_batches_tracked"]  # the first member's
    _want_close(spec, one, other, "another order of the members gave another result; say "
                "symmetric=False in the spec if order is meant to matter")


def order_of_tensors_does_not_matter(spec: FusionSpec) -> None:
    """The result for a tensor does not depend on which tensors were fused before it."""
    states, base = _states(spec), state_of(99)
    expected = _merge(spec, states, base)
    turned = [dict(reversed(each.items())) for each in states]
    _want_close(spec, _merge(spec, turned, base), expected, "another order of the tensors gave "
                "another result; keep nothing between two calls")


def cuts_do_not_matter(spec: FusionSpec) -> None:
    """A strategy of scope "slice" or "rows", and its measure, give the same however the tensors are
    cut."""
    states, base = _states(spec), state_of(99)
    keys = [key for key, tensor in states[0].items() if tensor.is_floating_point()]
    settings = resolve_options(spec, load(spec), checked(spec, {}), keys, len(states))
    merge = Merge(load(spec), spec, states, base if _has_base(spec) else None,
                  {key: [1.0] * len(states) for key in keys}, settings.common,
                  given=given(spec, torch.device("cpu")))
    if merge.scope not in ("slice", "rows"):
        return
    whole = _run(merge)
    cut = _run(replace(merge, piece=_PIECE, measured_piece=_PIECE))
    _want_close(spec, cut, whole, "another cut of the tensors gave another result; see nothing but "
                "the elements that are given, draw random numbers by `offset`, and leave what is "
                "needed of the whole tensor or model to `measure`")


def every_device_of_the_machine_works(spec: FusionSpec) -> None:
    """The result on every device equals the CPU's."""
    states, base = _states(spec), state_of(99)
    expected = _merge(spec, states, base)
    for device in devices():
        moved = [{key: tensor.to(device) for key, tensor in each.items()} for each in states]
        merged = _merge(spec, moved, {key: tensor.to(device) for key, tensor in base.items()})
        back = {key: tensor.cpu() for key, tensor in merged.items()}
        _want_close(spec, back, expected, f"the result on {device} is not the CPU's; make tensors "
                    "on the device of those that are given, and random numbers on the CPU")


def errors_name_option_and_value(spec: FusionSpec) -> None:
    """A number that an option cannot be is refused by an error that names both, or works."""
    want_errors_that_name(spec, lambda options: _merge(spec, _states(spec), state_of(99), options))


def _merge(
    spec: FusionSpec, states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    return merge_states(
        states, load(spec), spec=spec, base=base if _has_base(spec) else None,
        options=checked(spec, options or {}), given=given(spec, states[0]["scale"].device))


def _run(merge: Merge) -> dict[str, Tensor]:
    result = {key: torch.empty(merge.states[0][key].shape) for key in merge.weights}

    def write(key: str, start: int, part: Tensor) -> None:
        result[key].view(-1)[start:start + part.numel()] = part

    run(merge, write)
    return result


def _has_base(spec: FusionSpec) -> bool:
    return "base" in spec.uses | spec.can_use


def _want_close(
    spec: FusionSpec, one: Mapping[str, Tensor], other: Mapping[str, Tensor], problem: str
) -> None:
    for key in other:
        assert torch.allclose(one[key].double(), other[key].double(), atol=_TOLERANCE), (
            f"{spec.name}: {problem} (at {key!r})")


def _states(spec: FusionSpec) -> list[dict[str, Tensor]]:
    return [state_of(seed) for seed in range(count(spec))]


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()}


CHECKS: Sequence[Callable[[FusionSpec], None]] = (
    inputs_stay_as_they_are, keys_shapes_and_dtypes_are_kept, integer_buffers_are_copied,
    same_seed_gives_same_bytes, copies_of_a_model_give_it_back, order_does_not_matter,
    order_of_tensors_does_not_matter, cuts_do_not_matter, every_device_of_the_machine_works,
    fused_models_save_and_load, errors_name_option_and_value,
)
