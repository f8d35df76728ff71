"""What a fusion of weights may ask for beside tensors: the network, its permutations, images and
their labels, and how good a candidate is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.datasets import ImageData, load_data, loader, to_unit
from zoo.errors import DataError
from zoo.evaluation import predict
from zoo.fusion.norms import norm_keys, reestimate
from zoo.measures import measure
from zoo.model import Model
from zoo.specs import FusionSpec
from zoo.store import network

Norms = Literal["auto", "pooled", "reestimated"]

_BATCH = 64


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
    spec: FusionSpec, model: Model, classes: Sequence[str], data: Any, norms: Norms
) -> ImageData | None:
    """The data of a fusion of weights at the members' size, for all that looks at them: with
    labels where the strategy or batch norm needs them, or the strategy can use them and there are
    some. None where nothing looks.

    model: one of the members. classes: of the fused model. data: as `zoo.fuse` is given it.
    """
    choosing = norms != "pooled" and bool(norm_keys(network(model)))
    asked = spec.uses | spec.can_use
    if data is None or not (choosing or asked & {"data", "labels", "score"}):
        return None
    needed = bool(spec.uses & {"labels", "score"}) or (choosing and norms == "auto")
    try:
        images = load_data(data, role="train", image_size=model.image_size,
                           labelled=needed or bool(asked & {"labels", "score"}))
    except DataError:
        if needed:
            raise
        images = load_data(data, role="train", image_size=model.image_size, labelled=False)
    return images if images.labels is None else images.with_classes(classes)


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
        images, held_out = images.split(0.5)
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
    model: Model, images: ImageData, held_out: ImageData, norms: Norms
) -> tuple[tuple[float, float], bool]:
    """Choose batch norm's running statistics, in place: those that are there, those of the images,
    or (auto) what is better on held-out ones. Gives the accuracy and the negative NLL on these,
    and whether the statistics are new."""
    net = network(model)
    keys = norm_keys(net)
    if not keys or norms == "pooled":
        return accuracy(model, held_out), False
    old = {key: tensor.clone() for key, tensor in net.state_dict().items() if key in keys}
    before = accuracy(model, held_out) if norms == "auto" else (-1.0, 0.0)
    reestimate_norms(model, images)
    after = accuracy(model, held_out)
    if after >= before:
        return after, True
    net.load_state_dict(old, strict=False)
    return before, False


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
