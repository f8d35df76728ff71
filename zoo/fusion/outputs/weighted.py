"""A weighted mean of calibrated members: temperatures as in Guo et al. 2017, "On calibration of
modern neural networks", arXiv:1706.04599, weights on the simplex, both by the likelihood of
held-out data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import DataError, NotFitted

# Temperatures lie between 1/100 and 100.
LIMIT = 100.0


class Weighted(nn.Module):
    """Σᵢ wᵢ softmax(zᵢ / Tᵢ): one temperature and one weight per member, fitted by NLL.

    members: M. num_classes: C. Takes logits z [M, B, C] and gives log-probabilities [B, C], in
    float32. What was fitted is in the state dict: `temperatures` [M], `weights` [M] on the
    simplex, `fitted`. Raises NotFitted when used before.
    """

    temperatures: Tensor
    weights: Tensor
    fitted: Tensor

    def __init__(self, members: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("temperatures", torch.ones(members))
        self.register_buffer("weights", torch.full((members,), 1 / members))
        self.register_buffer("fitted", torch.tensor(False))
        self._ready = False  # `fitted` without a wait for the device, and for torch.compile
        self.register_load_state_dict_post_hook(_read_fitted)  # type: ignore[no-untyped-call]

    def forward(self, logits: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        if not self._ready:
            raise NotFitted("weighted has not been fitted to held-out data; make the model with "
                            "fuse(…, 'weighted', data=…)")
        scaled = (logits.float() / self.temperatures.float()[:, None, None]).log_softmax(2)
        shares = self.weights.float().log().log_softmax(0)
        return (scaled + shares[:, None, None]).logsumexp(0)  # (B, C)

    def fit(self, logits: Tensor, labels: Tensor) -> None:
        """Find temperatures and weights that make these labels likely.

        logits: [M, N, C] of held-out data. labels: integers [N] in [0, C). On these data the NLL
        is never above that of the uniform mean or of the best member, calibrated or not. Runs
        on the CPU in float64 without random numbers. Raises DataError for other shapes, for
        labels out of range and for logits that are not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            temperatures, weights = _best(*self._checked(logits, labels))
        self.temperatures.copy_(temperatures)
        self.weights.copy_(weights)
        self.fitted.fill_(True)
        self._ready = True

    def _checked(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 logits, and of each member the logit of the true label [M, N]."""
        members = len(self.weights)
        if logits.ndim != 3 or (len(logits), logits.shape[2]) != (members, self.num_classes):
            raise DataError(f"logits are {list(logits.shape)}, expected [{members}, N, "
                            f"{self.num_classes}]: members, images, classes")
        if labels.shape != logits.shape[1:2] or not len(labels):
            raise DataError(f"labels are {list(labels.shape)}, expected [{logits.shape[1]}], "
                            "one per image and at least one")
        if not logits.isfinite().all():
            raise DataError("some logits are not finite")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise DataError(f"labels run from {int(labels.min())} to {int(labels.max())}, "
                            f"expected 0 to {self.num_classes - 1}")
        wide = logits.detach().to("cpu", torch.float64, copy=True)
        index = labels.to("cpu", torch.int64).expand(members, -1)[..., None]
        return wide, wide.gather(2, index)[..., 0]


def _read_fitted(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Weighted)
    module._ready = bool(module.fitted)


def _best(logits: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest temperatures and weights [M] of: the uniform mean and each member alone,
    calibrated or not, and what a descent from the calibrated uniform mean finds."""
    members = len(logits)
    even = torch.zeros(members, dtype=torch.float64)
    calibrated = _descend(lambda t: -_log_likelihood(logits, true, _bounded(t)).mean(1).sum(), even)
    joint = _descend(
        lambda both: _nll(logits, true, _bounded(both[0]), both[1].softmax(0)),
        torch.stack([calibrated, even]),
    )
    candidates = [
        (temperatures, weights)
        for temperatures in (torch.ones(members), _bounded(calibrated).float())
        for weights in (torch.full((members,), 1 / members), *torch.eye(members))
    ]
    candidates.append((_bounded(joint[0]).float(), joint[1].softmax(0).float()))
    return min(candidates, key=lambda found: float(
        _nll(logits, true, found[0].double(), found[1].double())))


def _descend(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where L-BFGS gets from here."""
    point = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([point], max_iter=200, tolerance_grad=1e-7,
                                  tolerance_change=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return point.detach()


def _bounded(free: Tensor) -> Tensor:
    return torch.pow(LIMIT, free.tanh())


def _nll(logits: Tensor, true: Tensor, temperatures: Tensor, weights: Tensor) -> Tensor:
    likelihood = _log_likelihood(logits, true, temperatures)
    return -(likelihood + weights.log()[:, None]).logsumexp(0).mean()


def _log_likelihood(logits: Tensor, true: Tensor, temperatures: Tensor) -> Tensor:
    """log softmax(z / T) at the true label, [M, N]."""
    scaled = logits / temperatures[:, None, None]
    return true / temperatures[:, None] - scaled.logsumexp(2)
