"""An input-gated mixture: Jacobs et al. 1991, "Adaptive mixtures of local experts",
doi:10.1162/neco.1991.3.1.79, with experts that are trained already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zoo.errors import DataError, OptionError, ZooError
from zoo.fusion.outputs.pool import Pool, spread


class Gate(Pool):
    """Σᵢ gᵢ(x) softmax(zᵢ), the weights g from all members' pooled features x, standardised and of
    length about one: a linear map of them, or two with a hidden layer between.

    It begins at equal weights and trains by NLL; a part of the data is held out, on which the best
    epoch is chosen. There it is never less likely than the uniform mean.

    members: M. num_classes: C. dims: D of each member's features. Takes logits [M, B, C] and
    features, of each member [B, Dᵢ], and gives log-probabilities [B, C]. What was fitted is in the
    state dict: `centre` and `scale` [ΣD], `inner` [H, ΣD] and `inner_bias`, `outer` [M, H] and
    `outer_bias`, `fitted`. Random numbers are torch's, which zoo.fuse seeds. Raises NotFitted when
    used before.

    Options:
        hidden: units of the hidden layer; 0 for none
        epochs: most times over the data, 1 or more
        lr: step size of Adam, above 0
        weight_decay: pull of the gate's weights to equal ones, 0 or more
        patience: epochs without a better one after which it stops, 1 or more
        held_out: part of the data that chooses the epoch, in (0, 1)
        calibrate: give each member a temperature first, found on the same data
        recalibrate: give the mixture a temperature at last, found on the same data
    """

    learns = True
    wants_features = True
    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        members: int,
        num_classes: int,
        *,
        dims: Sequence[int],
        hidden: int = 0,
        epochs: int = 100,
        lr: float = 0.01,
        weight_decay: float = 0.01,
        patience: int = 10,
        held_out: float = 0.25,
        calibrate: bool = False,
        recalibrate: bool = False,
    ) -> None:
        super().__init__("gate", members, num_classes, calibrate=calibrate, recalibrate=recalibrate)
        for name, value, right, expected in (
            ("hidden", hidden, hidden >= 0, "a number of units, or 0 for none"),
            ("epochs", epochs, epochs >= 1, "1 or more"),
            ("lr", lr, lr > 0, "a step size above 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("patience", patience, patience >= 1, "1 or more"),
            ("held_out", held_out, 0 < held_out < 1, "a part in (0, 1)"),
        ):
            if not right:
                raise OptionError("gate", f"{name} is {value:g}, expected {expected}")
        self.dims = tuple(dims)
        self.epochs, self.lr, self.weight_decay = epochs, lr, weight_decay
        self.patience, self.held_out = patience, held_out
        total = sum(dims)
        self.register_buffer("centre", torch.zeros(total))
        self.register_buffer("scale", torch.ones(total))
        if hidden:
            self.register_buffer("inner", torch.zeros(hidden, total))
            self.register_buffer("inner_bias", torch.zeros(hidden))
        self.register_buffer("outer", torch.zeros(members, hidden or total))
        self.register_buffer("outer_bias", torch.zeros(members))

    def pool(self, logits: Tensor, features: Sequence[Tensor] | None) -> Tensor:
        x = self._standardised(self._joined(features))
        layers = {name: tensor.float() for name, tensor in self.named_buffers()}
        return _mixture(logits.log_softmax(2), _gated(x, layers))

    def learn(
        self, logits: Tensor, labels: Tensor, features: Sequence[Tensor] | None
    ) -> Mapping[str, Any]:
        joined = self._joined(features).detach().to("cpu", copy=True)  # (N, ΣD)
        likely = logits.log_softmax(2).float()
        if len(joined) != len(labels):
            raise DataError(f"the features are of {len(joined)} images, expected {len(labels)}")
        if not joined.isfinite().all():
            raise DataError("some features are not finite")
        place = spread(labels)
        out = ((place + 1) * self.held_out).floor() > (place * self.held_out).floor()
        kept = ~out
        if not kept.any() or not out.any():
            raise DataError(f"{len(labels)} images are too few to hold a part of "
                            f"{self.held_out:g} out; give gate more data")
        self.centre.copy_(joined[kept].mean(0))
        scale = joined[kept].std(0, correction=0)
        # So that a step has the same effect whatever the number of features.
        self.scale.copy_(torch.where(scale > 1e-6, scale, 1.0) * len(scale) ** 0.5)
        x = (joined - self.centre.cpu().float()) / self.scale.cpu().float()
        best, losses = self._trained(x, likely, labels, kept, out)
        for name, tensor in best.items():
            self.get_buffer(name).copy_(tensor)
        return {"epoch": losses.index(min(losses)), "held_out_nll": min(losses),
                "held_out_nll_of_the_mean": losses[0]}

    def _trained(
        self, x: Tensor, likely: Tensor, labels: Tensor, kept: Tensor, out: Tensor
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The layers of the best epoch, and the NLL of what is held out after each."""
        layers = {name: torch.zeros(tensor.shape) for name, tensor in self.named_buffers()
                  if name.startswith(("inner", "outer"))}
        if "inner" in layers:
            torch.nn.init.kaiming_uniform_(layers["inner"], nonlinearity="relu")
        weights = list(layers.values())
        for tensor in weights:
            tensor.requires_grad_()
        adam = torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay)
        rows = kept.nonzero()[:, 0]

        def loss(places: Tensor) -> Tensor:
            mixed = _mixture(likely[:, places], _gated(x[places], layers))
            return functional.nll_loss(mixed, labels[places])

        def of_held_out() -> float:
            with torch.no_grad():
                return float(loss(out.nonzero()[:, 0]))

        losses = [of_held_out()]
        best = {name: tensor.detach().clone() for name, tensor in layers.items()}
        for _ in range(self.epochs):
            for batch in torch.split(rows[torch.randperm(len(rows))], 64):
                adam.zero_grad()
                loss(batch).backward()  # type: ignore[no-untyped-call]
                adam.step()
            losses.append(of_held_out())
            if losses[-1] < min(losses[:-1]):
                best = {name: tensor.detach().clone() for name, tensor in layers.items()}
            elif len(losses) - 1 - losses.index(min(losses)) >= self.patience:
                break
        return best, losses

    def _joined(self, features: Sequence[Tensor] | None) -> Tensor:
        given = None if features is None else tuple(part.shape[1] for part in features)
        if features is None or given != self.dims:
            widths = "none" if given is None else f"of widths {list(given)}"
            raise ZooError(f"gate weighs the members by their features, and was given {widths}, "
                           f"expected one [B, D] of each: {list(self.dims)}")
        return torch.cat([part.float() for part in features], dim=1)

    def _standardised(self, joined: Tensor) -> Tensor:
        return (joined - self.centre.float()) / self.scale.float()


def _gated(x: Tensor, layers: Mapping[str, Tensor]) -> Tensor:
    """The log-weights [B, M] of features [B, ΣD]."""
    if "inner" in layers:
        x = functional.linear(x, layers["inner"], layers["inner_bias"]).relu()
    return functional.linear(x, layers["outer"], layers["outer_bias"]).log_softmax(1)


def _mixture(likely: Tensor, gates: Tensor) -> Tensor:
    """likely: log-probabilities [M, B, C]. gates: log-weights [B, M]."""
    return (likely + gates.T[..., None]).logsumexp(0)
