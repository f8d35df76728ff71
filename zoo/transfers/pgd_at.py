"""Train on the worst images that projected gradient descent finds.

Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
arXiv:1706.06083.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attacks.pgd import pgd
from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms, Objective


def pgd_at(
    model: Model,
    *,
    criterion: Criterion,
    eps: float = 8 / 255,
    steps: int = 7,
    step_size: float | None = None,
    ramp: float = 0.0,
    norms: Norms = "train",
) -> Objective:
    """Replace every batch by its adversarial images, found in evaluation mode from a random start.

    Options:
        eps: largest change of a pixel, in (0, 1]; 8/255 for photos, 0.1 to 0.3 for MNIST
        steps: gradient steps of the attack, 1 or more
        step_size: change of a pixel in one step; by default 2.5 · eps / steps
        ramp: share of the training, in [0, 1], over which eps and the step grow from 0; at a large
            eps, training without it can stay at a constant predictor
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    if steps < 1:
        raise OptionError("zoo/pgd_at", f"the option 'steps' is {steps}, expected 1 or more")
    step = 2.5 * eps / steps if step_size is None else step_size
    want_attack("zoo/pgd_at", eps, step, ramp)
    return Adversarial(model, criterion, eps=eps, steps=steps, step_size=step, ramp=ramp,
                       norms=norms)


class Adversarial(Objective):
    """The criterion on adversarial images."""

    needs_images = True

    def __init__(
        self, model: Model, criterion: Criterion, *, eps: float, steps: int, step_size: float,
        ramp: float, norms: Norms,
    ) -> None:
        super().__init__(model, criterion, norms=norms)
        self.eps = eps
        self.steps = steps
        self.step_size = step_size
        self.ramp = ramp

    def loss(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        share = min(1.0, batch.progress / self.ramp) if self.ramp else 1.0
        if share > 0:
            # Every batch of every epoch starts elsewhere in its ball.
            seed = int(torch.randint(2**31, ()).item())
            images = pgd(self.model, batch.images, batch.labels, eps=share * self.eps,
                         steps=self.steps, step_size=share * self.step_size, seed=seed)
        else:
            images = batch.images
        return self.criterion(self.model(images), batch.labels)


def want_attack(method: str, eps: float, step_size: float, ramp: float) -> None:
    if not 0 < eps <= 1:
        raise OptionError(method, f"the option 'eps' is {eps}, expected a change of pixels in "
                          "(0, 1]; write 8/255 as 0.0314")
    if step_size <= 0:
        raise OptionError(method, f"the option 'step_size' is {step_size}, expected more than 0")
    if not 0 <= ramp <= 1:
        raise OptionError(method, f"the option 'ramp' is {ramp}, expected a share in [0, 1]")
