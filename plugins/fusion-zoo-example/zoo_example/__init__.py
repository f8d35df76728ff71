"""The namespace `example`: one fusion of each kind, and a network.

zoo imports this module whenever it lists names, so nothing heavy is imported here: what `build`
names is imported when it is used.
"""

from __future__ import annotations

import zoo


@zoo.hookimpl
def zoo_backbones() -> list[zoo.BackboneSpec]:
    return [
        zoo.BackboneSpec(
            name="convmixer", build="zoo_example.convmixer:build",
            summary="A small ConvMixer for small images",
            paper="Trockman & Kolter 2022, arXiv:2201.09792", license="Apache-2.0",
            input_size=(3, 32, 32), feature_dim=64, loads_since="0.1.0",
        ),
    ]


@zoo.hookimpl
def zoo_fusions() -> list[zoo.FusionSpec]:
    return [
        zoo.FusionSpec(
            name="geometric_median", kind="weights",
            build="zoo_example.geometric_median:geometric_median",
            summary="The point nearest to all members, which one bad one cannot move",
            paper="Pillutla 2022, arXiv:1912.13445", license="Apache-2.0",
            symmetric=True, idempotent=True, loads_since="0.1.0",
        ),
        zoo.FusionSpec(
            name="hadamard", kind="features", build="zoo_example.hadamard:Hadamard",
            summary="The product of the members' projected features",
            paper="Kim 2017, arXiv:1610.04325", license="Apache-2.0", loads_since="0.1.0",
        ),
        zoo.FusionSpec(
            name="log_pool", kind="outputs", build="zoo_example.log_pool:LogPool",
            summary="The members' geometric mean, sharpened on held-out data",
            paper="Rahaman & Thiery 2021, arXiv:2007.08792", license="Apache-2.0",
            uses=frozenset({"data", "labels"}), symmetric=True, loads_since="0.1.0",
        ),
    ]
