"""A frozen trunk is run once over the data; what comes after it trains from the kept features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.datasets import ImageData, loader, to_unit
from zoo.model import Model
from zoo.progress import task

Features = tuple[Tensor, ...]


@torch.no_grad()
def extract(
    model: Model,
    data: ImageData,
    compute: Callable[[Tensor], Features],
    *,
    batch_size: int = 128,
    description: str = "features",
    workers: int = 0,
) -> Features:
    """What `compute` gives for every image of the data, in order, on the CPU.

    compute: images [B, C, H, W] on [0, 1], on the model's device, to a tuple of tensors [B, …].
    The model is in evaluation mode meanwhile, and every module gets its own mode back.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    kept: list[Tensor] = []
    done = 0
    try:
        with task(description, len(data), "images") as advance:
            for images, _ in loader(data, batch_size=batch_size, workers=workers):
                outputs = compute(to_unit(images.to(model.device, non_blocking=True)))
                if not kept:
                    kept = [torch.empty((len(data), *out.shape[1:]), dtype=out.dtype)
                            for out in outputs]
                for whole, part in zip(kept, outputs, strict=True):
                    whole[done:done + len(images)] = part
                done += len(images)
                advance(len(images))
    finally:
        for module, training in modes:
            module.training = training
    return tuple(kept)


def take(features: Sequence[Tensor], indices: Tensor, device: torch.device) -> Features:
    """The same rows of each, on a device."""
    return tuple(whole[indices].to(device, non_blocking=True) for whole in features)
