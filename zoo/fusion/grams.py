"""Gram matrices of the inputs of linear layers, and layers as regressions onto the members'."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError
from zoo.fusion.precision import doubled

# Elements of unfolded patches at a time.
_PIECE = 1 << 24
# On the diagonal of a Gram matrix that is scaled to ones there: above its rounding in float32.
_RIDGE = 1e-5


@torch.no_grad()
def input_grams(
    module: nn.Module, state: Mapping[str, Tensor], keys: Collection[str], data: Iterable[Tensor]
) -> dict[str, Tensor]:
    """XᵀX / N of the inputs X of each layer that is linear in its weight, by the weight's key.

    X are the rows that meet the weight: tokens, or the patches of a convolution. Left out are
    layers that are never called and those that do not answer with their weight times their input.

    module: is given the state, and runs in the mode that it is in. keys: of the weights to look at.
    data: batches [B, C, H, W]. Gives float64 [groups, n, n]. Raises DataError without images.
    """
    module.load_state_dict(dict(state))
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    other: set[str] = set()

    def watch(key: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for part, answer in _rows(layer, inputs[0], output):
                if key not in sums and not _linear(layer, part, answer):
                    other.add(key)
                if key in other:
                    return
                gram = doubled(part.mT @ part)
                sums[key] = sums[key] + gram if key in sums else gram
                rows[key] = rows.get(key, 0) + part.shape[1]

        return hook

    handles = [layer.register_forward_hook(watch(f"{name}.weight"))
               for name, layer in module.named_modules()
               if isinstance(layer, nn.Linear | nn.Conv2d) and f"{name}.weight" in keys]
    seen = False
    try:
        for batch in data:
            module(batch)
            seen = True
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise DataError("there are no images to measure the layers' inputs on")
    return {key: total / rows[key] for key, total in sums.items()}


def regressed(
    means: Mapping[str, Tensor],
    states: Sequence[Mapping[str, Tensor]],
    grams: Iterable[Mapping[str, Tensor]],
    weights: Mapping[str, Sequence[float]],
    damping: float,
) -> dict[str, Tensor]:
    """(Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ of each layer that has a Gram matrix in every member.

    means: the members' means, which stay in directions that no input has. grams: one mapping per
    member, as by `input_grams`; taken one after another, and changed. weights: one number ≥ 0 per
    member. damping: factor on the Gram matrices' off-diagonal entries.
    """
    wholes: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for number, (state, own) in enumerate(zip(states, grams, strict=True)):
        for key, gram in own.items():  # (G, n, n)
            diagonal = gram.diagonal(dim1=1, dim2=2).clone()
            gram.mul_(damping).diagonal(dim1=1, dim2=2).copy_(diagonal)
            gram.mul_(weights[key][number])
            away = doubled(state[key] - means[key])
            right = away.reshape(len(gram), -1, gram.shape[-1]) @ gram  # (G, out/G, n)
            wholes[key] = wholes[key].add_(gram) if key in wholes else gram
            rights[key] = rights[key].add_(right) if key in rights else right
        for key in wholes.keys() - own.keys():
            del wholes[key]
    return {key: means[key] + _solved(whole, rights[key]).reshape(means[key].shape).to(means[key])
            for key, whole in wholes.items()}


def _solved(whole: Tensor, right: Tensor) -> Tensor:
    """X of X · whole = right, zero where `whole` is; whole: [G, n, n], which is changed."""
    scale = whole.diagonal(dim1=1, dim2=2).sqrt().reciprocal()  # (G, n)
    scale = scale.where(scale.isfinite(), 0)
    whole.mul_(scale[:, :, None]).mul_(scale[:, None, :])
    whole.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    found: Tensor = torch.linalg.solve(whole, right * scale[:, None, :], left=False)
    return found * scale[:, None, :]


def _rows(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, output: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the weight of a layer meets, [groups, N, n], and the answers to it, [groups, N, out/G],
    a piece at a time."""
    if not isinstance(layer, nn.Conv2d):
        yield inputs.flatten(0, -2)[None], output.flatten(0, -2)[None]
        return
    images = functional.pad(inputs, _padding(layer, inputs, output))
    each = layer.weight[0].numel() * layer.groups * output.shape[-2:].numel()
    step = max(1, _PIECE // each)
    for some, answers in zip(torch.split(images, step), torch.split(output, step), strict=True):
        patches = functional.unfold(some, layer.kernel_size, layer.dilation, 0, layer.stride)
        yield _by_group(patches, layer.groups), _by_group(answers.flatten(2), layer.groups)


def _by_group(maps: Tensor, groups: int) -> Tensor:
    """[B, G · n, L] as [G, B · L, n]."""
    parts = maps.reshape(len(maps), groups, -1, maps.shape[-1])  # (B, G, n, L)
    return parts.permute(1, 0, 3, 2).flatten(1, 2)


def _padding(layer: nn.Conv2d, inputs: Tensor, output: Tensor) -> list[int]:
    """What is put around the images, in the order of `pad`: the layer's own padding, or what a
    layer that keeps the size by itself must have put there to answer in this one."""
    pads: list[int] = []
    for axis in (1, 0):
        step, span = layer.stride[axis], layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        size, answers = inputs.shape[2 + axis], output.shape[2 + axis]
        if not isinstance(layer.padding, str):
            own = layer.padding[axis]
            if (size + 2 * own - span) // step + 1 == answers:
                pads += [own, own]
                continue
        missing = max((answers - 1) * step + span - size, 0)
        pads += [missing // 2, missing - missing // 2]
    return pads


def _linear(layer: nn.Linear | nn.Conv2d, rows: Tensor, answers: Tensor) -> bool:
    """Whether the answers are the weight times the rows, plus the bias."""
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1])  # (G, out/G, n)
    expected = rows @ weight.mT
    if layer.bias is not None:
        expected = expected + layer.bias.view(len(rows), 1, -1)
    return expected.shape == answers.shape and torch.allclose(
        expected, answers, rtol=1e-3, atol=1e-3 * float(answers.abs().max()))
