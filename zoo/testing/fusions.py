"""Checks of fusion strategies, by kind, with their default options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from zoo.assembly import backbone, fuse
from zoo.errors import NotFitted, OptionError
from zoo.fusion.merging import merge_states
from zoo.model import Model
from zoo.options import checked
from zoo.registry import load
from zoo.specs import FusionSpec
from zoo.store import load as load_model
from zoo.store import save
from zoo.testing.devices import devices
from zoo.testing.given import given

_CLASSES = 4
_DIMS = (5, 3, 5)
_TOLERANCE = 1e-5


def inputs_stay_as_they_are(spec: FusionSpec) -> None:
    """Fusing changes none of its input tensors."""
    states, base = _states(_count(spec)), _state(99)
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
        states = [_cast(state, dtype) for state in _states(_count(spec))]
        merged = _merge(spec, states, _cast(_state(99), dtype))
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
    states = _states(_count(spec))
    merged = _merge(spec, states, _state(99))
    assert torch.equal(merged["bn.num_batches_tracked"], states[0]["bn.num_batches_tracked"]), (
        f"{spec.name} changed an integer buffer; with scope='model' copy what is not floating")


def same_seed_gives_same_bytes(spec: FusionSpec) -> None:
    """Twice the same fusion gives the same bytes, whatever torch's global generator says."""
    results = []
    for global_seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            results.append(_merge(spec, _states(_count(spec)), _state(99)))
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), (
            f"{spec.name} gave other bytes for {key!r} the second time; draw random numbers from "
            "the seed, the key and the offset, never from torch's global generator")


def copies_of_a_model_give_it_back(spec: FusionSpec) -> None:
    """Where the spec says idempotent, fusing k copies of a model returns the model."""
    if not spec.idempotent:
        return
    state = _state(0)
    merged = _merge(spec, [state] * _count(spec), _state(99))
    _want_close(spec, merged, state, "fusing copies of one model did not give it back; say "
                "idempotent=False in the spec if it is not meant to")


def order_does_not_matter(spec: FusionSpec) -> None:
    """Where the spec says symmetric, the order of the members does not change the result."""
    if not spec.symmetric:
        return
    states = _states(_count(spec))
    one, other = (_merge(spec, order, _state(99)) for order in (states, states[::-1]))
    del one["bn.num_batches_tracked"], other["bn.num_batches_tracked"]  # the first member's
    _want_close(spec, one, other, "another order of the members gave another result; say "
                "symmetric=False in the spec if order is meant to matter")


def every_device_of_the_machine_works(spec: FusionSpec) -> None:
    """The result on every device equals the CPU's."""
    states, base = _states(_count(spec)), _state(99)
    expected = _merge(spec, states, base)
    for device in devices():
        moved = [{key: tensor.to(device) for key, tensor in state.items()} for state in states]
        merged = _merge(spec, moved, {key: tensor.to(device) for key, tensor in base.items()})
        back = {key: tensor.cpu() for key, tensor in merged.items()}
        _want_close(spec, back, expected, f"the result on {device} is not the CPU's")


def fused_models_save_and_load(spec: FusionSpec) -> None:
    """A fused model has equal logits after zoo.save and zoo.load."""
    members = _members(_count(spec))
    started = members.pop() if "base" in spec.uses and len(members) > 1 else _members(1)[0]
    base = started if "base" in spec.uses else None
    while len(members) < spec.members[0]:
        members.append(_members(1)[0])
    _want_same_logits(spec, fuse(members, spec.name, base=base, data=_data(spec)))


def output_has_the_promised_shape(spec: FusionSpec) -> None:
    """A fuser of features gives [B, out_features] for members of different sizes."""
    fuser = _feature_fuser(spec)
    for batch in (1, 2, 7):
        out = fuser(_features(spec, batch))
        assert out.shape == (batch, fuser.out_features), (
            f"{spec.name} gave {list(out.shape)} for a batch of {batch}, expected "
            f"[{batch}, out_features = {fuser.out_features}]")


def gradients_reach_everything(spec: FusionSpec) -> None:
    """A loss on the output reaches every member's features and every parameter."""
    fuser = _feature_fuser(spec).train()
    features = [part.requires_grad_() for part in _features(spec, 8)]
    fuser(features).square().sum().backward()
    for number, part in enumerate(features):
        assert part.grad is not None, (
            f"no gradient reaches the features of member {number + 1} of {spec.name}")
        assert bool(part.grad.abs().sum() > 0), (
            f"the gradient at the features of member {number + 1} of {spec.name} is zero")
    for name, parameter in fuser.named_parameters():
        assert parameter.grad is not None, (
            f"no gradient reaches the parameter {name!r} of {spec.name}; use it in forward, or "
            "register it as a buffer")


def same_seed_builds_the_same_fuser(spec: FusionSpec) -> None:
    """Built twice with the same seed, a fuser has the same parameters."""
    one, other = _feature_fuser(spec).state_dict(), _feature_fuser(spec).state_dict()
    for key in one:
        assert torch.equal(one[key], other[key]), (
            f"{spec.name} started {key!r} differently with the same seed; draw from torch's "
            "generator, which zoo.fuse seeds")


def compiles_and_autocasts(spec: FusionSpec) -> None:
    """Works under torch.compile(fullgraph=True), torch.inference_mode and autocast."""
    module, inputs = _module_and_inputs(spec)
    module.eval()
    expected = module(inputs)
    try:
        compiled = torch.compile(module, backend="eager", fullgraph=True)(inputs)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise AssertionError(f"{spec.name} does not compile to one graph: {first}") from error
    assert torch.allclose(compiled, expected, atol=_TOLERANCE), (
        f"{spec.name} answers differently when it is compiled")
    with torch.inference_mode():
        module(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(inputs)
    assert bool(out.isfinite().all()), f"{spec.name} is not finite under bfloat16 autocast"


def answers_are_log_probabilities(spec: FusionSpec) -> None:
    """A fuser of outputs gives finite log-probabilities that add up to one."""
    fuser = _output_fuser(spec)
    for scale in (1.0, 50.0):
        out = fuser(scale * _logits(6))
        assert out.shape == (6, _CLASSES), (
            f"{spec.name} gave {list(out.shape)}, expected [6, {_CLASSES}]")
        assert bool(out.isfinite().all()), (
            f"{spec.name} gave a log-probability that is not finite for logits of ±{scale:g}; the "
            "NLL must stay finite")
        assert torch.allclose(out.exp().sum(1), torch.ones(6), atol=1e-4), (
            f"the probabilities of {spec.name} do not add up to one; return log-probabilities")


def refuses_to_answer_unfitted(spec: FusionSpec) -> None:
    """A strategy with `fit` raises NotFitted until it has seen data."""
    fuser = _build(spec, len(_DIMS), _CLASSES)
    if not hasattr(fuser, "fit"):
        return
    try:
        fuser(_logits(2))
    except NotFitted as error:
        assert str(error), f"the NotFitted of {spec.name} says nothing; name fuse(…, data=…)"
    else:
        raise AssertionError(f"{spec.name} has fit() and answers without it; raise zoo's NotFitted "
                             "from forward until it is fitted")


def outputs_order_does_not_matter(spec: FusionSpec) -> None:
    """Where the spec says symmetric, the order of the members does not change the answer."""
    if not spec.symmetric or hasattr(_build(spec, len(_DIMS), _CLASSES), "fit"):
        return
    fuser, logits = _output_fuser(spec), _logits(6)
    assert torch.allclose(fuser(logits), fuser(logits.flip(0)), atol=_TOLERANCE), (
        f"{spec.name} answers differently for another order of the members; say symmetric=False")


def outputs_of_copies_are_the_members(spec: FusionSpec) -> None:
    """Where the spec says idempotent, copies of one member answer like it."""
    if not spec.idempotent:
        return
    one = _logits(6)[:1]
    answer = _output_fuser(spec)(one.expand(len(_DIMS), -1, -1))
    assert torch.allclose(answer, one[0].log_softmax(1), atol=1e-4), (
        f"copies of one member do not answer like it in {spec.name}; say idempotent=False")


def wrong_options_are_named(spec: FusionSpec) -> None:
    """An option that does not exist is refused with the list of those that do."""
    try:
        checked(spec, {"no_such_option": 1})
    except OptionError as error:
        assert "no_such_option" in str(error)
    else:
        raise AssertionError(f"{spec.name} takes an option that does not exist")


def _merge(
    spec: FusionSpec, states: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return merge_states(
        states, load(spec), spec=spec, base=base if "base" in spec.uses else None,
        options=checked(spec, {}),
        given={**given(spec, _CLASSES, states[0]["fc.weight"].device), "report": {}})


def _want_close(
    spec: FusionSpec, one: Mapping[str, Tensor], other: Mapping[str, Tensor], problem: str
) -> None:
    for key in other:
        assert torch.allclose(one[key].double(), other[key].double(), atol=_TOLERANCE), (
            f"{spec.name}: {problem} (at {key!r})")


def _count(spec: FusionSpec) -> int:
    fewest, most = spec.members
    return min(max(3, fewest), most or 3)


def _states(count: int) -> list[dict[str, Tensor]]:
    return [_state(seed) for seed in range(count)]


def _state(seed: int) -> dict[str, Tensor]:
    """A convolution, batch norm with its counter, and a classifier."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "conv.weight": normal(4, 3, 3, 3), "bn.weight": normal(4), "bn.bias": normal(4),
        "bn.running_mean": normal(4), "bn.running_var": normal(4).square() + 0.1,
        "bn.num_batches_tracked": torch.tensor(10 + seed),
        "fc.weight": normal(_CLASSES, 4), "fc.bias": normal(_CLASSES), "scale": normal(1)[0],
    }


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()}


def _members(count: int) -> list[Model]:
    return [backbone("zoo/mnist_cnn", num_classes=_CLASSES, image_size=8, seed=seed, device="cpu")
            for seed in range(count)]


def _data(spec: FusionSpec) -> Any:
    """Images and labels to fit on, for a strategy that does."""
    if not spec.uses & {"data", "labels", "score"}:
        return None
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(32, 3, 8, 8, generator=generator)
    return torch.utils.data.TensorDataset(images, torch.arange(32) % _CLASSES)


def _want_same_logits(spec: FusionSpec, model: Model) -> None:
    model.eval()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with TemporaryDirectory() as folder, torch.no_grad():
        save(model, Path(folder, "model"))
        loaded = load_model(Path(folder, "model"), device="cpu")
        assert torch.equal(loaded(images), model(images)), (
            f"a model fused by {spec.name} answers differently after save and load; keep all that "
            "it has learnt in parameters and buffers")


def _build(spec: FusionSpec, *arguments: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = load(spec)(*arguments, **checked(spec, {}))
    assert isinstance(module, nn.Module), (
        f"{spec.build} gave a {type(module).__name__}, expected an nn.Module")
    return module


def _feature_fuser(spec: FusionSpec) -> Any:
    fuser = _build(spec, list(_DIMS))
    assert isinstance(getattr(fuser, "out_features", None), int), (
        f"{spec.name} does not say its size; set self.out_features to D of its output [B, D]")
    return fuser


def _output_fuser(spec: FusionSpec) -> Any:
    fuser: Any = _build(spec, len(_DIMS), _CLASSES)
    if hasattr(fuser, "fit"):
        fuser.fit(_logits(64), torch.arange(64) % _CLASSES)
    return fuser.eval()


def _features(spec: FusionSpec, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    shape = {"vectors": (), "tokens": (6,), "maps": ()}[spec.takes]
    after = (3, 3) if spec.takes == "maps" else ()
    return [torch.randn(batch, *shape, dim, *after, generator=generator) for dim in _DIMS]


def _logits(batch: int) -> Tensor:
    return torch.randn(len(_DIMS), batch, _CLASSES, generator=torch.Generator().manual_seed(0))


def _module_and_inputs(spec: FusionSpec) -> tuple[nn.Module, Any]:
    if spec.kind == "features":
        return _feature_fuser(spec), _features(spec, 4)
    return _output_fuser(spec), _logits(4)


CHECKS: Mapping[str, Sequence[Callable[[FusionSpec], None]]] = {
    "weights": (
        inputs_stay_as_they_are, keys_shapes_and_dtypes_are_kept, integer_buffers_are_copied,
        same_seed_gives_same_bytes, copies_of_a_model_give_it_back, order_does_not_matter,
        every_device_of_the_machine_works, fused_models_save_and_load, wrong_options_are_named,
    ),
    "features": (
        output_has_the_promised_shape, gradients_reach_everything,
        same_seed_builds_the_same_fuser, compiles_and_autocasts, fused_models_save_and_load,
        wrong_options_are_named,
    ),
    "outputs": (
        answers_are_log_probabilities, refuses_to_answer_unfitted, outputs_order_does_not_matter,
        outputs_of_copies_are_the_members, compiles_and_autocasts, fused_models_save_and_load,
        wrong_options_are_named,
    ),
}
