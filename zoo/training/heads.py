"""Train what comes after the members' features, on features that are there already."""

from __future__ import annotations

import torch

from zoo.datasets import ImageData
from zoo.features import Features
from zoo.model import Model
from zoo.training.checkpoints import Checkpoint
from zoo.training.loop import Judge, Loop, Transferred
from zoo.training.losses import criterion
from zoo.training.settings import Settings
from zoo.training.streams import Stream
from zoo.transfers.linear_probe import linear_probe
from zoo.transfers.objective import Phase


def train_head(model: Model, data: ImageData, features: Features, settings: Settings) -> None:
    """What `transfer(model, data, "linear_probe")` does, in place, without looking at an image.

    data: for the labels. features: what the members give of these images, as `trunk_features`.
    Raises TrainingError when the loss is not finite.
    """
    objective = linear_probe(model, criterion=criterion(settings.loss, settings.label_smoothing))
    own = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=own):
        objective.choose_trained()
        stream = Stream(model, data, settings, features=features)
        loop = Loop(Transferred(model, "zoo/linear_probe"), Phase(objective), 0, settings.epochs,
                    stream, Judge(model, None, settings, frozen=True), settings, done=0, share=1)
        loop.fit(Checkpoint(None, {}, writes=False))
    model.zero_grad()
    model.eval()
