"""Train the whole network, with the features of teachers as hints where there are any.

The hint: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", arXiv:1412.6550.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import OptionError
from zoo.model import Model
from zoo.transfers.freezing import frozen_parameters
from zoo.transfers.objective import Batch, Criterion, Norms, Objective, want_split


def finetune(
    model: Model,
    *,
    criterion: Criterion,
    teachers: Sequence[Model] = (),
    norms: Norms = "auto",
    hint: float = 1.0,
    freeze: int | str | list[str] | None = None,
) -> Objective:
    """Train every parameter, but those that are frozen.

    Options:
        norms: batch norm in the members: train it, keep it frozen, or (auto) frozen if pretrained
        hint: weight, 0 or more, of the distance to the teachers' features when there are teachers
        freeze: so many leading blocks of each network, or parts of it by name or pattern, with
            "members.0." before it of one member; without augmentation they are run over the data
            once
    """
    frozen = frozen_parameters("zoo/finetune", model, freeze)
    if not teachers:
        return Objective(model, criterion, norms=norms, frozen=frozen)
    if hint < 0:
        raise OptionError("zoo/finetune", f"the option 'hint' is {hint}, expected 0 or more")
    want_split("zoo/finetune", model)
    return Hinted(model, criterion, [teacher.dim for teacher in teachers], norms=norms, hint=hint,
                  frozen=frozen)


class Hinted(Objective):
    """A linear regressor per teacher predicts its features from the student's; the mean squared
    error of standardised features joins the loss. The regressors are left behind afterwards."""

    reads_logits = False

    def __init__(
        self, model: Model, criterion: Criterion, teacher_dims: Sequence[int], *, norms: Norms,
        hint: float, frozen: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__(model, criterion, norms=norms, frozen=frozen)
        self.hint = hint
        self.regressors = nn.ModuleList(nn.Linear(model.dim, dim) for dim in teacher_dims)

    def loss(self, batch: Batch) -> Tensor:
        assert batch.images is not None
        embedding = self.model.embed(batch.images)  # (B, D)
        loss = self.criterion(self.model.classify(embedding), batch.labels)
        for regressor, taught in zip(self.regressors, batch.taught, strict=True):
            wanted = functional.layer_norm(taught.embedding, taught.embedding.shape[1:])
            loss = loss + self.hint * functional.mse_loss(regressor(embedding), wanted)
        return loss
