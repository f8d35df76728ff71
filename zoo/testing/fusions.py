"""Checks of fusions of features and of outputs, with their default options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from zoo.assembly import backbone, fuse
from zoo.errors import NotFitted
from zoo.model import Model
from zoo.options import accepts, checked
from zoo.registry import load
from zoo.specs import FusionSpec
from zoo.store import load as load_model
from zoo.store import save
from zoo.testing.devices import devices
from zoo.testing.options import want_errors_that_name

_CLASSES = 4
_DIMS = (5, 3, 5)
_TOLERANCE = 1e-5


def fused_models_save_and_load(spec: FusionSpec) -> None:
    """A fused model has equal logits after zoo.save and zoo.load."""
    # Of features, those of members whose images, and so whose tokens and maps, differ in size.
    sides = (8, 12, 8) if spec.kind == "features" else (8,)
    members = _members(count(spec), sides)
    started = members.pop() if "base" in spec.uses and len(members) > 1 else _members(1)[0]
    base = started if "base" in spec.uses else None
    while len(members) < spec.members[0]:
        members.append(_members(1)[0])
    _want_same_logits(spec, fuse(members, spec.name, base=base, data=_data(spec)))


def output_has_the_promised_shape(spec: FusionSpec) -> None:
    """A fuser of features gives [B, out_features] for members of different sizes: pooled features
    and tokens differ in D, tokens in number too, maps are of one height and width."""
    fuser = _feature_fuser(spec).eval()
    for batch in (1, 2, 7):
        out = fuser(_features(spec, batch))
        assert out.shape == (batch, fuser.out_features), (
            f"{spec.name} gave {list(out.shape)} for a batch of {batch}, expected "
            f"[{batch}, out_features = {fuser.out_features}]")


def gradients_reach_everything(spec: FusionSpec) -> None:
    """A loss on the output reaches every member's features and every parameter."""
    fuser = _feature_fuser(spec).train()
    features = [part.requires_grad_() for part in _features(spec, 8)]
    out = fuser(features)
    # Not the sum of squares, which is the same for whatever a last layer norm gives.
    (out * torch.linspace(-1, 1, out.shape[1])).square().sum().backward()
    for number, part in enumerate(features):
        assert part.grad is not None, (
            f"no gradient reaches the features of member {number + 1} of {spec.name}; use those of "
            "every member in forward, without detach()")
        assert bool(part.grad.abs().sum() > 0), (
            f"the gradient at the features of member {number + 1} of {spec.name} is zero")
    for name, parameter in fuser.named_parameters():
        assert parameter.grad is not None, (
            f"no gradient reaches the parameter {name!r} of {spec.name}; use it in forward, or "
            "register it as a buffer")


def images_do_not_mix(spec: FusionSpec) -> None:
    """In evaluation, what a fuser of features gives for an image depends on that image alone."""
    fuser = _feature_fuser(spec).eval()
    features = _features(spec, 4)
    with torch.no_grad():
        alone = fuser([part[:1] for part in features])
        among = fuser(features)[:1]
    assert torch.allclose(alone, among, atol=_TOLERANCE), (
        f"{spec.name} answers differently for an image alone and among others; normalise by image, "
        "or keep running statistics for evaluation")


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
    torch.compiler.reset()  # dynamo keeps eight compilations of a `forward` that strategies share
    try:
        compiled = torch.compile(module, backend="eager", fullgraph=True)(inputs)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise AssertionError(f"{spec.name} does not compile to one graph: {first}; let forward be "
                             "plain tensor code") from error
    assert torch.allclose(compiled, expected, atol=_TOLERANCE), (
        f"{spec.name} answers differently when it is compiled")
    with torch.inference_mode():
        module(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(inputs)
    assert bool(out.isfinite().all()), f"{spec.name} is not finite under bfloat16 autocast"


def inputs_stay_as_they_are(spec: FusionSpec) -> None:
    """The fuser changes none of the tensors that it is given."""
    module, inputs = _module_and_inputs(spec)
    before = [part.clone() for part in inputs]
    module.eval()(inputs)
    for number, (old, new) in enumerate(zip(before, inputs, strict=True), 1):
        assert torch.equal(old, new), (
            f"{spec.name} changed what member {number} gave; work without in-place operations")


def every_device_of_the_machine_works(spec: FusionSpec) -> None:
    """The answer on every device is about the CPU's."""
    module, inputs = _module_and_inputs(spec)
    expected = module.eval()(inputs)
    for device in devices():
        moved = inputs.to(device) if isinstance(inputs, Tensor) else [
            part.to(device) for part in inputs]
        try:
            answer = module.to(device)(moved).cpu()
        except RuntimeError as error:
            raise AssertionError(f"{spec.name} does not work on {device}: {error}; keep tensors in "
                                 "parameters and buffers, which move with the module") from error
        assert torch.allclose(answer, expected, atol=1e-3), (
            f"{spec.name} answers differently on {device}; keep tensors in parameters and buffers, "
            "and draw no random numbers in eval mode")


def errors_name_option_and_value(spec: FusionSpec) -> None:
    """A number that an option cannot be is refused by an error that names both, or works."""
    def use(options: Mapping[str, Any]) -> None:
        module, inputs = _module_and_inputs(spec, options)
        module.eval()(inputs)

    want_errors_that_name(spec, use)


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
    if not hasattr(_build(spec, len(_DIMS), _CLASSES), "fit"):
        return
    fuser = _whole(_build(spec, len(_DIMS), _CLASSES))
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


def count(spec: FusionSpec) -> int:
    """Members to check a strategy with: three, or the nearest number that it takes; the fewest for
    one that tries all the others."""
    fewest, most = spec.members
    if spec.kind == "choice":
        return fewest
    return min(max(3, fewest), most or 3)


def _members(count: int, sides: Sequence[int] = (8,)) -> list[Model]:
    return [backbone("zoo/mnist_cnn", num_classes=_CLASSES, image_size=sides[seed % len(sides)],
                     seed=seed, device="cpu") for seed in range(count)]


def _data(spec: FusionSpec) -> Any:
    """Images and labels, for a strategy that learns from some."""
    if spec.kind != "outputs" and not spec.uses & {"data", "labels", "score"}:
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


def _build(
    spec: FusionSpec, *arguments: Any, options: Mapping[str, Any] | None = None
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        builder = load(spec)
        given = {"dims": list(_DIMS), "known": torch.ones(len(_DIMS), _CLASSES, dtype=torch.bool)}
        core = {name: value for name, value in given.items()
                if spec.kind == "outputs" and accepts(builder, name)}
        module = builder(*arguments, **core, **checked(spec, options or {}))
    assert isinstance(module, nn.Module), (
        f"{spec.build} gave a {type(module).__name__}, expected an nn.Module")
    return module


def _feature_fuser(spec: FusionSpec, options: Mapping[str, Any] | None = None) -> Any:
    fuser = _build(spec, list(_DIMS), options=options)
    assert isinstance(getattr(fuser, "out_features", None), int), (
        f"{spec.name} does not say its size; set self.out_features to D of its output [B, D]")
    return fuser


def _output_fuser(spec: FusionSpec, options: Mapping[str, Any] | None = None) -> Any:
    fuser = _whole(_build(spec, len(_DIMS), _CLASSES, options=options))
    if hasattr(fuser, "fit"):
        fuser.fit(_logits(64), torch.arange(64) % _CLASSES)
    return fuser.eval()


class _Fed(nn.Module):
    """A fuser of outputs that wants features too: it is given some that depend on the logits."""

    def __init__(self, fuser: Any) -> None:
        super().__init__()
        self.fuser = fuser
        generator = torch.Generator().manual_seed(0)
        for number, dim in enumerate(_DIMS):
            self.register_buffer(f"map{number}", torch.randn(_CLASSES, dim, generator=generator))

    def forward(self, logits: Tensor) -> Tensor:
        return self.fuser(logits, self.features(logits))  # type: ignore[no-any-return]

    def fit(self, logits: Tensor, labels: Tensor) -> None:
        self.fuser.fit(logits, labels, features=self.features(logits))

    def features(self, logits: Tensor) -> list[Tensor]:
        return [part @ self.get_buffer(f"map{number}") for number, part in enumerate(logits)]


def _whole(fuser: nn.Module) -> Any:
    return _Fed(fuser) if getattr(fuser, "wants_features", False) else fuser


def _features(spec: FusionSpec, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    before: Sequence[tuple[int, ...]] = ((6,), (1,), (4,)) if spec.takes == "tokens" else ((),) * 3
    after = (3, 2) if spec.takes == "maps" else ()
    return [torch.randn(batch, *count, dim, *after, generator=generator)
            for count, dim in zip(before, _DIMS, strict=True)]


def _logits(batch: int) -> Tensor:
    return torch.randn(len(_DIMS), batch, _CLASSES, generator=torch.Generator().manual_seed(0))


def _module_and_inputs(
    spec: FusionSpec, options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, Any]:
    if spec.kind == "features":
        return _feature_fuser(spec, options), _features(spec, 4)
    return _output_fuser(spec, options), _logits(4)


FEATURES: Sequence[Callable[[FusionSpec], None]] = (
    output_has_the_promised_shape, gradients_reach_everything, images_do_not_mix,
    same_seed_builds_the_same_fuser,
    inputs_stay_as_they_are, every_device_of_the_machine_works, compiles_and_autocasts,
    fused_models_save_and_load, errors_name_option_and_value,
)
CHOICES: Sequence[Callable[[FusionSpec], None]] = (fused_models_save_and_load,)
OUTPUTS: Sequence[Callable[[FusionSpec], None]] = (
    answers_are_log_probabilities, refuses_to_answer_unfitted, outputs_order_does_not_matter,
    outputs_of_copies_are_the_members, inputs_stay_as_they_are, every_device_of_the_machine_works,
    compiles_and_autocasts, fused_models_save_and_load,
    errors_name_option_and_value,
)
