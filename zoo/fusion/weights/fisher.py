"""Fisher merging: Matena & Raffel 2022, "Merging models with Fisher-weighted averaging",
arXiv:2111.09832."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import DataError, FusionError, OptionError
from zoo.fusion.weighting import want_shares
from zoo.fusion.weights.average import average

State = Mapping[str, Tensor]


def fisher(
    states: Sequence[State],
    *,
    weights: Mapping[str, Sequence[float]],
    module: nn.Module,
    data: Iterable[Tensor],
    labels: Iterable[Tensor] | None = None,
    seed: int = 0,
    labels_from: Literal["sampled", "expected", "true"] = "sampled",
    normalise: bool = True,
    floor: float = 1e-6,
) -> dict[str, Tensor]:
    """Σ wᵢFᵢθᵢ / Σ wᵢFᵢ: each weight counts as much as its member's answers depend on it.

    Fᵢ is the diagonal of the Fisher information: the mean over images of the squared gradient of
    log p(y | x), taken image by image, in evaluation mode. Where no member depends on a weight, the
    floor makes it the mean. What no gradient reaches is averaged. The paper measures each member on
    the data of its own task; here the images are the same for all.

    states: one per member. weights: by key, one number ≥ 0 per member. labels: for
    `labels_from="true"` alone. seed: of sampled labels, the same draws for every member.
    Raises OptionError for a negative weight or floor, FusionError for true labels that are not
    given, DataError without images.
    Matena & Raffel 2022, arXiv:2111.09832.

    Options:
        labels_from: where y comes from: one "sampled" from the member's own answer, all classes
            ("expected", weighed by it; a backward pass each, as in the paper's experiments), or
            "true", the labels of the data (the empirical Fisher)
        normalise: divide each Fᵢ by its norm over the model, so that no member counts more because
            its gradients are larger
        floor: what every entry of an Fᵢ has at least, as a part of the mean entry, 0 or more
    """
    if floor < 0:
        raise OptionError("fisher", f"floor is {floor}, expected 0 or more")
    want_shares("fisher", weights)
    if labels_from == "true" and labels is None:
        raise FusionError("fisher", "labels_from is 'true', and the data have no labels",
                          "Pass labelled data, or labels_from='sampled'")
    found = []
    for state in states:
        own = _information(module, state, data, labels if labels_from == "true" else None,
                           expected=labels_from == "expected", seed=seed)
        own = {key: own[key] for key in weights if key in own}
        norm = torch.cat([part.flatten() for part in own.values()]).norm()
        found.append({key: part / norm if normalise and norm > 0 else part
                      for key, part in own.items()})
    entries = sum(part.numel() for own in found for part in own.values())
    mean = sum(float(part.sum()) for own in found for part in own.values()) / entries
    least = max(floor * mean, torch.finfo(torch.float32).tiny)
    return {key: _weighted([state[key] for state in states],
                           [own[key].clamp(min=least) * share
                            for own, share in zip(found, row, strict=True)])
            if key in found[0] else
            average([state[key] for state in states], base=None, key=key, weight=row)
            for key, row in weights.items()}


def _weighted(tensors: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    whole = torch.stack(list(importance)).sum(0)
    mean = tensors[0].clone()
    for tensor, own in zip(tensors[1:], importance[1:], strict=True):
        # Offsets from the first member keep equal members exactly equal.
        mean += (tensor - tensors[0]) * (own / whole)
    return mean


@torch.enable_grad()
def _information(
    module: nn.Module, state: State, data: Iterable[Tensor], labels: Iterable[Tensor] | None,
    *, expected: bool, seed: int,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of every parameter that a gradient reaches."""
    module.load_state_dict(dict(state))
    module.requires_grad_(True)
    names, parameters = zip(*module.named_parameters(), strict=True)
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    reached = [False] * len(sums)
    draws = torch.Generator().manual_seed(seed)
    images = 0

    def add(loss: Tensor, share: float, *, again: bool) -> None:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=again, allow_unused=True)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                sums[place].addcmul_(gradient, gradient, value=share)
                reached[place] = True

    for batch, truth in zip(data, repeat(None) if labels is None else labels, strict=False):
        for place in range(len(batch)):
            images += 1
            log_p = module(batch[place:place + 1]).log_softmax(1)[0]  # (C,)
            p = log_p.detach().exp().cpu()
            if expected:
                for answer, share in enumerate(p.tolist()):
                    add(log_p[answer], share, again=True)
            else:
                answer = int(torch.multinomial(p, 1, generator=draws) if truth is None
                             else truth[place])
                add(log_p[answer], 1.0, again=False)
    if not images:
        raise DataError("there are no images to measure the Fisher information on")
    return {name: part / images for name, part, used in zip(names, sums, reached, strict=True)
            if used}
