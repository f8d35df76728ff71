"""Projected gradient descent in the L∞ ball. Madry et al. 2018, arXiv:1706.06083."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.attacks.gradients import ball, input_gradient, white_box
from zoo.errors import OptionError


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    seed: int = 0,
) -> Tensor:
    """Many small steps up the sign of the gradient, each clipped back to the ball and to [0, 1].

    model: images to logits or log-probabilities [B, C]; images: float [B, …] on [0, 1];
    labels: [B]; seed: of the random starts. Gives images of the same shape, for each the worst of
    the restarts: the first that is misclassified, else the one with the greatest loss.

    Options:
        eps: how far a pixel may move, on the [0, 1] scale of the images, 0 to 1
        steps: gradient steps in one restart, at least 1
        step_size: how far one step moves a pixel; 2.5 · eps / steps when not given
        restarts: how often to start again, at least 1; images already misclassified are left out
        random_start: start at a uniformly random point of the ball and not at the image

    Raises OptionError for values outside these and DataError for images off [0, 1].
    """
    _check(steps, step_size, restarts, random_start)
    step = 2.5 * eps / steps if step_size is None else step_size
    generator = torch.Generator(images.device).manual_seed(seed)
    with white_box(model, images, labels) as (clean, true):
        lower, upper = ball("pgd", clean, eps)
        worst = clean.clone()
        greatest = clean.new_full((len(clean),), -torch.inf)  # (B,)
        left = torch.arange(len(clean), device=clean.device)  # images nothing has fooled yet
        for _ in range(restarts):
            low, high = lower[left], upper[left]
            x = clean[left]
            if random_start:
                noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
                x = (x + noise).clamp(low, high)
            for _ in range(steps):
                x = (x + step * input_gradient(model, x, true[left]).sign()).clamp(low, high)
            if restarts == 1:
                return x
            loss, fooled = _judge(model, x, true[left])
            worse = fooled | (loss > greatest[left])
            worst[left[worse]], greatest[left[worse]] = x[worse], loss[worse]
            left = left[~fooled]
            if len(left) == 0:
                break
    return worst


@torch.no_grad()
def _judge(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image, and whether it is misclassified: both (B,)."""
    logits = model(images).float()  # (B, C)
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return loss, logits.argmax(dim=1) != labels


def _check(steps: int, step_size: float | None, restarts: int, random_start: bool) -> None:
    for name, value in (("steps", steps), ("restarts", restarts)):
        if value < 1:
            raise OptionError("pgd", f"the option {name!r} is {value}, expected at least 1")
    if step_size is not None and step_size <= 0:
        raise OptionError("pgd", f"the option 'step_size' is {step_size}, expected more than 0")
    if restarts > 1 and not random_start:
        raise OptionError("pgd", f"{restarts} restarts from the same point are one; "
                                 "leave random_start on, or restarts at 1")
