"""The namespace `keras`: the networks of keras.applications, and a user's own Keras files."""

from __future__ import annotations

import zoo
from zoo_keras.table import NETWORKS


@zoo.hookimpl
def zoo_backbones() -> list[zoo.BackboneSpec]:
    networks = [
        zoo.BackboneSpec(
            name=name, build="zoo_keras.applications:build",
            summary=f"keras.applications.{network.constructor}", paper=network.paper,
            input_size=(3, network.size, network.size), feature_dim=network.features,
            weights="https://storage.googleapis.com/tensorflow/keras-applications/",
            loads_since="0.1.0",
        )
        for name, network in NETWORKS.items()
    ]
    file = zoo.BackboneSpec(
        name="file", build="zoo_keras.files:build",
        summary="your own Keras model: path=model.keras, or a whole-model .h5",
        weights="the file that `path` names", loads_since="0.1.0",
    )
    return [*networks, file]
