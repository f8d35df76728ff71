"""Checks of networks, without their published weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from zoo.assembly import backbone
from zoo.backbones.semantics import pooled_features
from zoo.errors import WeightsError
from zoo.model import Model
from zoo.options import accepts
from zoo.registry import load
from zoo.specs import BackboneSpec
from zoo.store import load as load_model
from zoo.store import save
from zoo.testing.devices import devices

_CLASSES = 4
# Small enough to be quick, large enough for five halvings and a 3 × 3 window.
_SIDE = 96


def has_timms_semantics(spec: BackboneSpec) -> None:
    """forward_features, forward_head, get_classifier, reset_classifier, num_features, and
    `preprocessing` are there, and fit together."""
    model = _model(spec)
    net = next(model.each_member()).net
    for name in ("forward_features", "forward_head", "get_classifier", "reset_classifier"):
        assert callable(getattr(net, name, None)), f"{spec.name} has no method {name}"
    assert isinstance(getattr(net, "num_features", None), int), (
        f"{spec.name} does not say self.num_features, the channels of forward_features")
    member = next(model.each_member())
    with torch.no_grad():
        features = pooled_features(net, member.prepare(_images(model)))
    assert features.shape == (2, model.dim), (
        f"forward_head(…, pre_logits=True) of {spec.name} gave {list(features.shape)}, expected "
        f"[2, {model.dim}]")
    if spec.feature_dim:
        assert model.dim == spec.feature_dim, (
            f"{spec.name} has {model.dim} features and its spec says {spec.feature_dim}; correct "
            "feature_dim")


def gives_logits_of_the_asked_number(spec: BackboneSpec) -> None:
    """num_classes gives that many logits, before and after reset_classifier."""
    model = _model(spec)
    with torch.no_grad():
        logits = model(_images(model))
    assert logits.shape == (2, _CLASSES), (
        f"{spec.name} gave {list(logits.shape)} for num_classes={_CLASSES}; build the classifier "
        "with that many outputs")
    model.reset_classes(["a", "b", "c"])
    with torch.no_grad():
        assert model(_images(model)).shape == (2, 3), (
            f"reset_classifier(3) of {spec.name} did not change the number of logits; let it put a "
            "new classifier in place")


def takes_other_channels(spec: BackboneSpec) -> None:
    """in_chans=1 and 3 build and run."""
    for channels in (1, 3):
        try:
            model = _model(spec, in_chans=channels)
            with torch.no_grad():
                model(torch.rand(2, channels, model.image_size, model.image_size))
        except RuntimeError as error:
            raise AssertionError(f"{spec.name} does not work with in_chans={channels}: {error}; "
                                 "build the first layer with in_chans channels") from error


def weights_are_real_or_refused(spec: BackboneSpec) -> None:
    """A network without published weights refuses pretrained=True, and never gives random ones."""
    if spec.weights:
        return
    try:
        backbone(spec.name, num_classes=_CLASSES, pretrained=True, device="cpu")
    except WeightsError as error:
        assert str(error), f"the WeightsError of {spec.name} says nothing"
    else:
        raise AssertionError(f"{spec.name} has no `weights` in its spec and builds with "
                             "pretrained=True; raise zoo.errors.WeightsError")


def gradients_reach_every_parameter(spec: BackboneSpec) -> None:
    """A loss on the logits reaches every parameter."""
    model = _model(spec).train()
    model(_images(model)).square().sum().backward()
    dead = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not dead, (f"no gradient reaches {', '.join(dead[:3])} of {spec.name}; use them in "
                      "forward, without detach()")


def images_stay_as_they_are(spec: BackboneSpec) -> None:
    """The network does not change the images that it is given."""
    member = next(_model(spec).each_member())
    images = member.prepare(_images(_model(spec)))
    before = images.clone()
    with torch.no_grad():
        member.net(images)
    assert torch.equal(images, before), (
        f"{spec.name} changed its input; begin without an in-place operation")


def same_seed_builds_the_same_network(spec: BackboneSpec) -> None:
    """Built twice with one seed, the weights are the same."""
    one, other = _model(spec).state_dict(), _model(spec).state_dict()
    for key in one:
        assert torch.equal(one[key], other[key]), (
            f"{spec.name} started {key!r} differently with the same seed; draw from torch's "
            "generator, which zoo.backbone seeds")


def network_saves_and_loads(spec: BackboneSpec) -> None:
    """Equal logits after zoo.save and zoo.load, on every device of the machine."""
    model = _model(spec)
    images = _images(model)
    with TemporaryDirectory() as folder, torch.no_grad():
        save(model, Path(folder, "model"))
        for device in devices():
            loaded = load_model(Path(folder, "model"), device=device)
            answer = loaded(images.to(device)).cpu()
            expected = model(images)
            same = torch.equal(answer, expected) if device.type == "cpu" else torch.allclose(
                answer, expected, atol=1e-3)
            assert same, (f"{spec.name} answers differently after save and load on {device}; keep "
                          "all that forward needs in parameters and buffers")


def network_compiles_and_autocasts(spec: BackboneSpec) -> None:
    """Works under torch.compile(fullgraph=True), torch.inference_mode and autocast."""
    model = _model(spec)
    images = _images(model)
    with torch.no_grad():
        expected = model(images)
        try:
            compiled = torch.compile(model, backend="eager", fullgraph=True)(images)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise AssertionError(f"{spec.name} does not compile to one graph: {first}; let forward "
                                 "be plain tensor code") from error
    assert torch.allclose(compiled, expected, atol=1e-4), (
        f"{spec.name} answers differently when it is compiled")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert bool(model(images).isfinite().all()), f"{spec.name} is not finite under autocast"


def _model(spec: BackboneSpec, in_chans: int = 3) -> Model:
    side = min(_SIDE, spec.input_size[-1]) if accepts(load(spec), "image_size") else None
    return backbone(spec.name, num_classes=_CLASSES, in_chans=in_chans, image_size=side, seed=0,
                    device="cpu").eval()


def _images(model: Model) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, model.image_size, model.image_size, generator=generator)


CHECKS: Sequence[Callable[[BackboneSpec], None]] = (
    has_timms_semantics, gives_logits_of_the_asked_number, takes_other_channels,
    weights_are_real_or_refused, gradients_reach_every_parameter, images_stay_as_they_are,
    same_seed_builds_the_same_network, network_saves_and_loads, network_compiles_and_autocasts,
)
