"""Train on one-step attacks from a random start (FGSM-RS).

Wong et al. 2020, "Fast is better than free: Revisiting adversarial training", arXiv:2001.03994.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attacks.pgd import pgd
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms
from zoo.transfers.pgd_at import Adversarial, want_attack

_COLLAPSE = 0.2


def fgsm_at(
    model: Model,
    *,
    criterion: Criterion,
    eps: float = 8 / 255,
    step_size: float | None = None,
    ramp: float = 0.0,
    norms: Norms = "train",
) -> Adversarial:
    """Replace every batch by images one signed gradient step away from a uniform start in the ball.
    It costs little more than plain training, and can overfit to its own attack all at once: PGD-10
    on one batch is watched after each epoch, and an epoch that loses 20 points there is taken back.

    Options:
        eps: largest change of a pixel, in (0, 1]
        step_size: length of the step; by default 1.25 · eps
        ramp: share of the training, in [0, 1], over which eps and the step grow from 0
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    step = 1.25 * eps if step_size is None else step_size
    want_attack("zoo/fgsm_at", eps, step, ramp)
    return FastAdversarial(model, criterion, eps=eps, steps=1, step_size=step, ramp=ramp,
                           norms=norms)


class FastAdversarial(Adversarial):
    """One-step adversarial training that stops before an epoch in which PGD breaks through."""

    def __init__(
        self, model: Model, criterion: Criterion, *, eps: float, steps: int, step_size: float,
        ramp: float, norms: Norms,
    ) -> None:
        super().__init__(model, criterion, eps=eps, steps=steps, step_size=step_size, ramp=ramp,
                         norms=norms)
        self.register_buffer("best", torch.zeros(()))  # so that a resumed run remembers it
        self.best: Tensor

    @torch.no_grad()
    def check(self, batch: Batch) -> str | None:
        assert batch.images is not None
        attacked = pgd(self.model, batch.images, batch.labels, eps=self.eps, steps=10)
        self.model.eval()
        accuracy = (self.model(attacked).argmax(1) == batch.labels).float().mean()
        if accuracy < self.best - _COLLAPSE:
            return (f"catastrophic overfitting: accuracy under PGD-10 fell from {self.best:.0%} to "
                    f"{accuracy:.0%}; a smaller eps or step_size, or pgd_at, is steadier")
        self.best.clamp_(min=accuracy)
        return None
