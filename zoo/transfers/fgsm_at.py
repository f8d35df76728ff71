"""Train on one-step attacks from a random start (FGSM-RS).

Wong et al. 2020, "Fast is better than free: Revisiting adversarial training", arXiv:2001.03994.
"""

from __future__ import annotations

from torch import Tensor

from zoo.attacks.pgd import pgd
from zoo.model import Model
from zoo.transfers.objective import Batch, Criterion, Norms
from zoo.transfers.pgd_at import Adversarial, want_eps

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
        ramp: share of the training over which eps grows from 0
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
    """
    want_eps("zoo/fgsm_at", eps)
    step = 1.25 * eps if step_size is None else step_size
    return FastAdversarial(model, criterion, eps=eps, steps=1, step_size=step, ramp=ramp,
                           norms=norms)


class FastAdversarial(Adversarial):
    best = 0.0

    def check(self, batch: Batch) -> str | None:
        assert batch.images is not None
        attacked = pgd(self.model, batch.images, batch.labels, eps=self.eps, steps=10)
        self.model.eval()
        accuracy = self._accuracy(attacked, batch.labels)
        if accuracy < self.best - _COLLAPSE:
            return (f"catastrophic overfitting: accuracy under PGD-10 fell from {self.best:.0%} to "
                    f"{accuracy:.0%}; a smaller eps or step_size, or pgd_at, is steadier")
        self.best = max(self.best, accuracy)
        return None

    def _accuracy(self, images: Tensor, labels: Tensor) -> float:
        return float((self.model(images).argmax(1) == labels).float().mean())
