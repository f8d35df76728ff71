"""What a fusion of weights may ask for beside tensors: the network, its permutations, images and
their labels, and how good a candidate is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.backbones.semantics import classifier_keys
from zoo.datasets import ImageData, load_data, loader, to_unit
from zoo.errors import DataError, FusionError
from zoo.evaluation import predict
from zoo.fusion.norms import norm_keys, reestimate
from zoo.fusion.precision import widened
from zoo.measures import measure
from zoo.model import Model
from zoo.specs import FusionSpec
from zoo.store import network

Norms = Literal["auto", "pooled", "reestimated", "repair"]

_BATCH = 64
_REPAIRED_ON = 2048  # images, where repair is one of several candidates
SEPARATE = 0.5  # cosine of weights below which networks count as separately started


@dataclass(frozen=True, slots=True)
class Members:
    """What repair needs of those that were fused: their states, with the fusion's channels, and
    how much of each is in it."""

    states: Sequence[Mapping[str, Tensor]]
    shares: Sequence[float]


class Inputs:
    """The batches [B, C, H, W] that a model's network gets for these images; again and again."""

    def __init__(self, model: Model, images: ImageData) -> None:
        self._model = model
        self._images = images

    def __iter__(self) -> Iterator[Tensor]:
        member = next(self._model.each_member())
        for pixels, _ in loader(self._images, batch_size=_BATCH):
            yield member.prepare(to_unit(pixels.to(self._model.device)))

    def __len__(self) -> int:
        return -(-len(self._images) // _BATCH)


class Labels:
    """The labels [B] of the same batches, in the order of the model's classes."""

    def __init__(self, model: Model, labels: Tensor) -> None:
        self._batches = torch.split(labels.to(model.device), _BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def opened(
    spec: FusionSpec, models: Sequence[Model], classes: Sequence[str], data: Any, norms: Norms
) -> ImageData | None:
    """The data of a fusion of weights at the members' size, for all that looks at them: with
    labels where the strategy or batch norm needs them, or the strategy or a repair can use them
    and there are some. None where nothing looks.

    models: the members. classes: of the fused model. data: as `zoo.fuse` is given it.
    """
    if data is None:
        return None
    normed = norms != "pooled" and bool(norm_keys(network(models[0])))
    repairing = wants_repair(spec, models, norms)
    asked = spec.uses | spec.can_use
    if not (normed or repairing or asked & {"data", "labels", "score"}):
        return None
    needed = bool(spec.uses & {"labels", "score"}) or (normed and norms == "auto")
    wanted = bool(asked & {"labels", "score"}) or (repairing and norms == "auto")
    size = models[0].image_size
    try:
        images = load_data(data, role="train", image_size=size, labelled=needed or wanted)
    except DataError:
        if needed:
            raise
        images = load_data(data, role="train", image_size=size, labelled=False)
    return images if images.labels is None else images.with_classes(classes)


def can_repair(spec: FusionSpec, members: int) -> bool:
    """Whether the fusion's channels are those of its members, and their shares are known: not
    where units move, or where a search decides who is in it."""
    return members > 1 and not spec.uses & {"graph", "score"}


def wants_repair(spec: FusionSpec, models: Sequence[Model], norms: Norms) -> bool:
    """Whether repair is asked for, or (auto) may help: always with batch norm, and in networks
    without it between members from different basins, where activations lose their variance."""
    if not can_repair(spec, len(models)) or norms not in ("auto", "repair"):
        return False
    return norms == "repair" or bool(norm_keys(network(models[0]))) or _apart(models)


def parted(
    spec: FusionSpec, model: Model, images: ImageData, norms: Norms, *, repairing: bool = False
) -> tuple[ImageData, ImageData]:
    """The images that a fusion may look at, and those that judge it: halves, or all of them twice
    where neither the strategy nor batch norm nor a repair would look at any."""
    looks = bool((spec.uses | spec.can_use) & {"data", "labels"}) or repairing or (
        norms in ("auto", "reestimated") and bool(norm_keys(network(model))))
    return images.split(0.5) if looks else (images, images)


def _apart(models: Sequence[Model]) -> bool:
    """Whether the weights of two of these point in directions of their own, as after separate
    starts. Scales and biases start alike everywhere and are left out."""
    net = network(models[0])
    heads = classifier_keys(net)
    keys = [key for key, tensor in net.state_dict().items()
            if tensor.is_floating_point() and tensor.ndim > 1 and key not in heads
            and bool(tensor.isfinite().all())]  # no mask, which is the same in all
    gram = torch.zeros(len(models), len(models), dtype=torch.float64)
    states = [network(model).state_dict() for model in models]
    for key in keys:
        rows = torch.stack([state[key].flatten().cpu().float() for state in states])
        gram += (rows @ rows.T).double()
    lengths = gram.diagonal().sqrt()
    return bool(keys) and bool((gram < SEPARATE * lengths[:, None] * lengths).any())


def keywords(
    spec: FusionSpec, model: Model, images: ImageData | None, norms: Norms
) -> dict[str, Any]:
    """The keywords that the spec asks for, with None for what it can do without.

    model: the first member, on the device to compute on. images: see `opened`.
    """
    asked = (spec.uses | spec.can_use) - {"base"}
    found: dict[str, Any] = dict.fromkeys(asked)
    if not asked:
        return found
    module = copy.deepcopy(model).eval()
    if all(parameter.dtype != torch.float64 for parameter in module.parameters()):
        module.float()  # the precision of the states
    if "module" in asked:
        found["module"] = network(module)
    if "graph" in asked:
        found["graph"] = _graph(module)
    if images is None:
        return found
    if "score" in asked and images.labels is not None:
        images, held_out = parted(spec, model, images, norms)
        found["score"] = score_of(copy.deepcopy(module), images, held_out, norms)
    if "data" in asked:
        found["data"] = Inputs(module, images)
    if "labels" in asked and images.labels is not None:
        found["labels"] = Labels(module, images.labels)
    return found


def score_of(
    model: Model, images: ImageData, held_out: ImageData, norms: Norms
) -> Callable[[Mapping[str, Tensor]], float]:
    """The accuracy on held-out images of a model with a given state.

    Batch norm is treated as in the final model: its running statistics are the state's, or
    estimated again on the images, or (auto) what is better; what the state lacks is estimated.
    model: is written to.
    """
    net = network(model)
    statistics = norm_keys(net)

    def score(state: Mapping[str, Tensor]) -> float:
        net.load_state_dict(dict(state), strict=False)
        (right, _), _ = settled(model, images, held_out,
                                norms if statistics <= state.keys() else "reestimated")
        return right

    return score


def settled(
    model: Model, images: ImageData, held_out: ImageData, norms: Norms,
    members: Members | None = None,
) -> tuple[tuple[float, float], str]:
    """Choose how activations are normalised, in place: as they are, by statistics of the images,
    repaired, or (auto) what is best on held-out images.

    members: for repair, where it is possible. Gives the accuracy and the negative NLL on the
    held-out images, and what was done: "" (nothing), "reestimated" or "repaired".
    """
    net = network(model)
    ways = ["reestimated"] if norms in ("auto", "reestimated") and norm_keys(net) else []
    ways += ["repaired"] if norms in ("auto", "repair") and members is not None else []
    if not ways:
        return accuracy(model, held_out), ""
    if norms == "auto":
        ways = ["", *ways]
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    best: tuple[tuple[float, float], str, dict[str, Tensor]] | None = None
    for way in ways:
        net.load_state_dict(before)
        if way == "reestimated":
            reestimate_norms(model, images)
        elif way == "repaired":
            assert members is not None
            try:
                repair_norms(model, members, images.take(_REPAIRED_ON))
            except FusionError:  # there is no layer to correct
                if norms != "auto":
                    raise
                continue
        score = accuracy(model, held_out)
        # Of equal ones, statistics of the images go before pooled ones, and less work before more.
        if best is None or score > best[0] or (score == best[0] and way == "reestimated"):
            best = score, way, {key: tensor.clone() for key, tensor in net.state_dict().items()}
    assert best is not None
    net.load_state_dict(best[2])
    return best[0], best[1]


def repair_norms(model: Model, members: Members, images: ImageData) -> None:
    """Give the channels their mean and deviation in the members again, in place."""
    from zoo.fusion.align.repairing import repaired

    net = network(model)
    fused = _widened(net.state_dict())
    wide = copy.deepcopy(model).eval()
    if all(parameter.dtype != torch.float64 for parameter in wide.parameters()):
        wide.float()
    net.load_state_dict(repaired(
        network(wide), fused, [{**fused, **_widened(state)} for state in members.states],
        members.shares, Inputs(wide, images)))


def _widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: widened(tensor) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()}


def reestimate_norms(model: Model, images: ImageData) -> None:
    """Estimate batch norm's running statistics from these images, in place."""
    # A last batch of one image has no variance.
    batches = loader(images, batch_size=128, drop_last=len(images) > 128)
    reestimate(model, (to_unit(pixels.to(model.device)) for pixels, _ in batches))


def accuracy(model: Model, images: ImageData) -> tuple[float, float]:
    """The accuracy and the negative NLL: the larger, the better, in that order."""
    assert images.labels is not None
    measured = measure(predict(model, images, keep=False), images.labels, model.classes)
    return measured["accuracy"], -measured["nll"]


@torch.no_grad()
def _graph(model: Model) -> Any:
    from zoo.fusion.align import trace

    member = next(model.each_member())
    side = model.image_size
    blank = torch.rand(1, 3, side, side, device=model.device,
                       generator=torch.Generator(model.device).manual_seed(0))
    return trace(network(model), member.prepare(blank))
