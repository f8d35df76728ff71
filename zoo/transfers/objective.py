"""What a transfer method hands to the training loop: modules to train and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.errors import OptionError
from zoo.member import Member
from zoo.model import Model

Criterion = Callable[[Tensor, Tensor], Tensor]
Norms = Literal["auto", "train", "frozen"]


@dataclass(frozen=True, slots=True)
class Taught:
    """What one teacher says of a batch: its embedding [B, D] and logits [B, classes]."""

    embedding: Tensor
    logits: Tensor


@dataclass(slots=True)
class Batch:
    """One step's data, on the model's device.

    labels: [B], the model's own class numbers; -1 where the images have no labels.
    images: [B, C, H, W] on [0, 1]; None when the trunk is frozen and `features` are given instead.
    features: what each member gives: [B, Dᵢ], tokens [B, Nᵢ, Dᵢ] or maps [B, Cᵢ, H, W].
    unlabelled: target images, for methods that use them.
    taught: one entry per teacher.
    progress: the share of the whole training that is done, in [0, 1).
    """

    labels: Tensor
    images: Tensor | None = None
    features: tuple[Tensor, ...] | None = None
    unlabelled: Tensor | None = None
    taught: tuple[Taught, ...] = ()
    progress: float = 0.0


class Objective(nn.Module):
    """The plain objective: the criterion on the model's logits. Methods override `loss`.

    The loop trains every parameter that requires a gradient, the model's and those of modules
    that a subclass brings, and calls the objective itself, so that it can be wrapped for
    distributed training.

    trunk: whether the members' networks train, or only what comes after their features; a
        frozen trunk is run once over the data, where there is room for what it gives, not in every
        epoch.
    norms: what batch norm does while the trunk trains: `"frozen"` keeps the statistics, `"auto"`
        keeps those of pretrained members.
    reads_logits: whether the loss reads the teachers' logits. They are then those of the model's
        classes, which every teacher must have; without it teachers may have any.
    frozen: parameters of the trunk that stay as they are while the others train. Layers of which
        all are frozen work as in evaluation; where nothing before them trains, they are run once.
    """

    needs_images = False
    reads_logits = True

    def __init__(
        self, model: Model, criterion: Criterion, *, trunk: bool = True, norms: Norms = "auto",
        frozen: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.trunk = trunk
        self.norms = norms
        self.frozen = list(frozen)

    def choose_trained(self) -> None:
        """Mark the model's parameters that train in this phase; called before it begins."""
        self.model.requires_grad_(self.trunk)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        for parameter in self.model.head_parameters():
            parameter.requires_grad_(True)

    def begin(self, taught: Iterable[Sequence[Taught]]) -> None:
        """Called before the first epoch with what the teachers say of all images, in batches and
        without augmentation; it is computed only if it is read."""

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        return self.criterion(self.logits(batch), batch.labels)

    def logits(self, batch: Batch) -> Tensor:
        """The model's logits [B, classes], from the features if the trunk is frozen."""
        if batch.features is not None:
            return self.model.classify(self.model.join(batch.features))
        assert batch.images is not None
        return self.model(batch.images)  # type: ignore[no-any-return]

    def check(self, batch: Batch) -> str | None:
        """Called after each epoch with its first batch: a reason to stop and to take that epoch
        back, or None."""
        return None

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if not mode:
            return self
        for member in self.model.each_member():
            if not self.trunk:
                member.eval()
            elif self.freezes_norms(member):
                for module in member.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        frozen = {id(parameter) for parameter in self.frozen}
        for module in self.model.modules() if frozen else ():
            own = [id(parameter) for parameter in module.parameters()]
            if own and frozen.issuperset(own):
                module.eval()
        return self

    def freezes_norms(self, member: Member) -> bool:
        """Whether a member's batch norm keeps its statistics: with few labels, training it can
        collapse a pretrained network."""
        if not self.trunk:
            return True
        if self.norms == "auto":
            return bool(member.source)
        return self.norms == "frozen"

    def record_norms(self) -> None:
        """Write onto the members whose statistics an epoch has changed that they were trained."""
        for member in self.model.each_member():
            if not self.freezes_norms(member):
                for part in member.modules():
                    if isinstance(part, Member) and part.norms != "none":
                        part.norms = "trained"


@dataclass(frozen=True)
class Phase:
    """One part of a method that trains in several: its share of the epochs, and what it
    multiplies the learning rate by."""

    objective: Objective
    share: float = 1.0
    lr_scale: float = 1.0


def want_split(method: str, model: Model) -> None:
    """Raise OptionError for a network whose logits are not its classifier's answer to its pooled
    features: a loss on those features would train another network than the one that answers."""
    if not model.splits:
        raise OptionError(method, f"{model.name} computes more between its pooled features and its "
                          "logits; take another backbone or another method")
