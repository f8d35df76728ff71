"""The fast gradient sign method. Goodfellow et al. 2015, arXiv:1412.6572."""

from __future__ import annotations

from torch import Tensor, nn

from zoo.attacks.gradients import ball, input_gradient, white_box


def fgsm(model: nn.Module, images: Tensor, labels: Tensor, *, eps: float) -> Tensor:
    """One step of size eps up the sign of the gradient of the cross-entropy.

    model: images to logits or log-probabilities [B, C]; images: float [B, …] on [0, 1];
    labels: [B]. Gives images of the same shape within eps of each pixel and within [0, 1].

    Options:
        eps: how far a pixel may move, on the [0, 1] scale of the images, 0 to 1

    Raises OptionError for another eps and DataError for images off [0, 1].
    """
    with white_box(model, images, labels) as (clean, true):
        lower, upper = ball("fgsm", clean, eps)
        step = eps * input_gradient(model, clean, true).sign()
        return (clean + step).clamp(lower, upper)
