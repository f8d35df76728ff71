"""What every white-box attack needs: the model as it is at test time, and the gradient of its
loss to the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import DataError, OptionError


@contextmanager
def white_box(
    model: nn.Module, images: Tensor, labels: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hold the model in evaluation mode, gradients on and autocast off, and put back every
    module's own mode afterwards; gives copies of the images (float32 or wider) and labels.

    images: float [B, …] on [0, 1]; labels: [B]. Works inside `torch.inference_mode`, because an
    inference tensor's copy is an ordinary one. Raises DataError for images off [0, 1].
    """
    if not (images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())):
        raise DataError(f"an attack needs float images on [0, 1], and these are {images.dtype} "
                        f"from {images.min().item():g} to {images.max().item():g}; "
                        "scale them, and leave the normalising to the model")
    # Flags, not train() and eval(): a module that overrides those may do more than set its flag.
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with (torch.inference_mode(False), torch.enable_grad(),
              torch.autocast(images.device.type, enabled=False)):
            wide = torch.promote_types(images.dtype, torch.float32)
            yield images.detach().clone().to(wide), labels.clone()
    finally:
        for module, training in modes:
            module.training = training


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy to its own pixels, [B, …].

    Parameters are left alone: no `.grad` is written. Zero where the output does not depend
    differentiably on the pixels (a vote, a rounding).
    """
    images = images.detach().requires_grad_()
    loss = functional.cross_entropy(model(images).float(), labels, reduction="sum")
    if not loss.requires_grad:
        return torch.zeros_like(images)
    return torch.autograd.grad(loss, images, materialize_grads=True)[0]


def ball(attack: str, images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of every pixel within eps of the images and within [0, 1].

    Raises OptionError when eps is not in [0, 1].
    """
    if not 0 <= eps <= 1:
        raise OptionError(attack, f"the option 'eps' is {eps}, expected 0 to 1, the range of a "
                                  "pixel (8 of 255 levels are 0.0314)")
    return (images - eps).clamp(min=0), (images + eps).clamp(max=1)


def zero_gradient_share(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, 0 to 1, whose loss has no gradient at any pixel.

    images: float [B, …] on [0, 1]; labels: [B]. Such an image looks robust only because a
    gradient attack cannot move it (Athalye et al. 2018, arXiv:1802.00420).
    """
    with white_box(model, images, labels) as (clean, true):
        gradient = input_gradient(model, clean, true)
    # A gradient that is nan moves nothing either, and no comparison with it holds.
    return 1 - (gradient.abs() > 0).flatten(1).any(dim=1).double().mean().item()
