"""Train the head on a frozen network's features."""

from __future__ import annotations

from zoo.model import Model
from zoo.transfers.objective import Criterion, Objective


def linear_probe(model: Model, *, criterion: Criterion) -> Objective:
    """Train only what comes after the members' features: the classifier, and the fuser of a
    fused model. The networks run once over the data."""
    return Objective(model, criterion, trunk=False)
