"""What fusions of outputs share: fitting once, being refused before, and temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import DataError, NotFitted, OptionError
from zoo.fusion.outputs.calibration import likeliest_temperatures

Fit = Callable[..., Mapping[str, Any]]


class Pool(nn.Module):
    """Logits [M, B, C] to log-probabilities [B, C], in float32. A strategy writes `pool`, and
    `learn` where it `learns`.

    strategy: its name, for errors. members: M. num_classes: C. calibrate: divide each member's
    logits by a temperature of its own (Guo et al. 2017). recalibrate: divide what was pooled by
    one: a pool of calibrated members is unsure of itself (Wu and Gales 2021, "Should ensemble
    members be calibrated?", arXiv:2101.05397). What is fitted stands in the state dict:
    `temperatures` [M], `pool_temperature`, what the strategy registers, and `fitted`; there is none
    of it where there is nothing to fit.
    """

    learns = False
    wants_features = False  # whether `fit` and `forward` must be given the members' features
    fitted: Tensor
    temperatures: Tensor
    pool_temperature: Tensor

    def __init__(
        self, strategy: str, members: int, num_classes: int, *,
        calibrate: bool = False, recalibrate: bool = False,
    ) -> None:
        super().__init__()
        self.strategy = strategy
        self.members = members
        self.num_classes = num_classes
        self.calibrates = calibrate
        self.recalibrates = recalibrate
        if calibrate:
            self.register_buffer("temperatures", torch.ones(members))
        if recalibrate:
            self.register_buffer("pool_temperature", torch.ones(()))
        self._ready = True  # `fitted` without a wait for the device, and for torch.compile
        if self.learns or calibrate or recalibrate:
            self.register_buffer("fitted", torch.tensor(False))
            self._ready = False
            self.register_load_state_dict_post_hook(_read_fitted)  # type: ignore[no-untyped-call]

    def forward(self, logits: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        if not self._ready:
            raise NotFitted(f"{self.strategy} has not been fitted to held-out data; make the model "
                            f"with fuse(…, '{self.strategy}', data=…)")
        logits = logits.float()
        if self.calibrates:
            logits = logits / self.temperatures.float()[:len(logits), None, None]
        pooled = self.pool(logits, features)
        if self.recalibrates:
            pooled = (pooled / self.pool_temperature.float()).log_softmax(1)
        return pooled

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        """Log-probabilities [B, C] of logits [M, B, C], calibrated already."""
        raise NotImplementedError

    def learn(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None
    ) -> Mapping[str, Any]:
        """Fit what is the strategy's own. logits: float64 [M, N, C], calibrated, on the CPU.
        labels: int64 [N]. Gives what the recipe is to say of it, as JSON values."""
        return {}

    @property
    def fit(self) -> Fit:
        """`fit(logits, labels, features=None)`, where there is something to fit.

        logits: [M, N, C] of held-out data. labels: integers [N] in [0, C). features: of each
        member [N, Dᵢ], for a strategy that wants_features. Gives what was found, as JSON values.
        Raises DataError for other shapes, labels out of range and logits that are not finite.
        """
        if not (self.learns or self.calibrates or self.recalibrates):
            raise AttributeError(f"{self.strategy} has nothing to fit with these options")
        return self._fit

    def _fit(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None = None
    ) -> Mapping[str, Any]:
        told: dict[str, Any] = {}
        with torch.inference_mode(False), torch.enable_grad():
            wide, truth = self._checked(logits, labels)
            if self.calibrates:
                found = likeliest_temperatures(wide, truth)
                told["temperatures"] = found.tolist()
                wide = wide / found[:, None, None]
            told |= self.learn(wide, truth, features)
            if self.recalibrates:
                with torch.no_grad():
                    pooled = self.pool(wide.float().to(logits.device), features)
                pool_found = likeliest_temperatures(pooled[None].cpu().double(), truth)[0]
                told["pool_temperature"] = float(pool_found)
        if self.calibrates:
            self.temperatures.copy_(found)
        if self.recalibrates:
            self.pool_temperature.copy_(pool_found)
        self.fitted.fill_(True)
        self._ready = True
        return told

    def _checked(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 logits and int64 labels on the CPU."""
        members = self.members
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
        return (logits.detach().to("cpu", torch.float64, copy=True),
                labels.to("cpu", torch.int64, copy=True))


def member_weights(strategy: str, weights: Sequence[float] | None, members: int) -> Tensor:
    """One number per member [M] that a user gave, all equal without. Raises OptionError for another
    number of them, for one below 0, and when all are 0."""
    if weights is None:
        return torch.ones(members)
    if len(weights) != members or min(weights) < 0 or max(weights) == 0:
        raise OptionError(strategy, f"weights is {list(weights)}, expected {members} numbers of 0 "
                          "or more, one per member and not all 0")
    return torch.tensor(weights, dtype=torch.float32)


def mean_of_probabilities(logits: Tensor, shares: Tensor | None = None) -> Tensor:
    """log Σᵢ wᵢ softmax(zᵢ), [B, C], of logits [M, B, C] and shares w [M] that add up to one."""
    likely = logits.log_softmax(2)
    if shares is None:
        return likely.logsumexp(0) - math.log(len(logits))
    return (likely + shares.log()[:, None, None]).logsumexp(0)


def spread(labels: Tensor) -> Tensor:
    """Each image's place [N] in the order of the labels: every n-th place has every class."""
    places = torch.empty_like(labels)
    places[labels.argsort(stable=True)] = torch.arange(len(labels))
    return places


def _read_fitted(module: nn.Module, incompatible: Any) -> None:
    assert isinstance(module, Pool)
    module._ready = bool(module.fitted)
