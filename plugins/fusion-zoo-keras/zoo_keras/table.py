"""What keras.applications has on torch: names, sizes and preprocessing, known without Keras.

NASNet is missing: Keras refuses to build it on this backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Network(NamedTuple):
    """constructor: in keras.applications. mode: of Keras' preprocess_input; "pixels" where the
    network scales them itself. size: side of the images of the ImageNet weights. features: D of
    the pooled features. paper: where it comes from."""

    constructor: str
    mode: str
    size: int
    features: int
    paper: str


_VGG = "Simonyan & Zisserman 2015, arXiv:1409.1556"
_RESNET = "He et al. 2016, arXiv:1512.03385"
_RESNET_V2 = "He et al. 2016, arXiv:1603.05027"
_DENSENET = "Huang et al. 2017, arXiv:1608.06993"
_INCEPTION_RESNET = "Szegedy et al. 2017, arXiv:1602.07261"
_MOBILENET_V3 = "Howard et al. 2019, arXiv:1905.02244"
_EFFICIENTNET = "Tan & Le 2019, arXiv:1905.11946"
_EFFICIENTNET_V2 = "Tan & Le 2021, arXiv:2104.00298"
_CONVNEXT = "Liu et al. 2022, arXiv:2201.03545"

_ALL = (
    Network("VGG16", "caffe", 224, 4096, _VGG),
    Network("VGG19", "caffe", 224, 4096, _VGG),
    Network("ResNet50", "caffe", 224, 2048, _RESNET),
    Network("ResNet101", "caffe", 224, 2048, _RESNET),
    Network("ResNet152", "caffe", 224, 2048, _RESNET),
    Network("ResNet50V2", "tf", 224, 2048, _RESNET_V2),
    Network("ResNet101V2", "tf", 224, 2048, _RESNET_V2),
    Network("ResNet152V2", "tf", 224, 2048, _RESNET_V2),
    Network("InceptionV3", "tf", 299, 2048, "Szegedy et al. 2016, arXiv:1512.00567"),
    Network("InceptionResNetV2", "tf", 299, 1536, _INCEPTION_RESNET),
    Network("Xception", "tf", 299, 2048, "Chollet 2017, arXiv:1610.02357"),
    Network("MobileNet", "tf", 224, 1024, "Howard et al. 2017, arXiv:1704.04861"),
    Network("MobileNetV2", "tf", 224, 1280, "Sandler et al. 2018, arXiv:1801.04381"),
    Network("MobileNetV3Small", "pixels", 224, 1024, _MOBILENET_V3),
    Network("MobileNetV3Large", "pixels", 224, 1280, _MOBILENET_V3),
    Network("DenseNet121", "torch", 224, 1024, _DENSENET),
    Network("DenseNet169", "torch", 224, 1664, _DENSENET),
    Network("DenseNet201", "torch", 224, 1920, _DENSENET),
    Network("EfficientNetB0", "pixels", 224, 1280, _EFFICIENTNET),
    Network("EfficientNetB1", "pixels", 240, 1280, _EFFICIENTNET),
    Network("EfficientNetB2", "pixels", 260, 1408, _EFFICIENTNET),
    Network("EfficientNetB3", "pixels", 300, 1536, _EFFICIENTNET),
    Network("EfficientNetB4", "pixels", 380, 1792, _EFFICIENTNET),
    Network("EfficientNetB5", "pixels", 456, 2048, _EFFICIENTNET),
    Network("EfficientNetB6", "pixels", 528, 2304, _EFFICIENTNET),
    Network("EfficientNetB7", "pixels", 600, 2560, _EFFICIENTNET),
    Network("EfficientNetV2B0", "pixels", 224, 1280, _EFFICIENTNET_V2),
    Network("EfficientNetV2B1", "pixels", 240, 1280, _EFFICIENTNET_V2),
    Network("EfficientNetV2B2", "pixels", 260, 1408, _EFFICIENTNET_V2),
    Network("EfficientNetV2B3", "pixels", 300, 1536, _EFFICIENTNET_V2),
    Network("EfficientNetV2S", "pixels", 384, 1280, _EFFICIENTNET_V2),
    Network("EfficientNetV2M", "pixels", 480, 1280, _EFFICIENTNET_V2),
    Network("EfficientNetV2L", "pixels", 480, 1280, _EFFICIENTNET_V2),
    Network("ConvNeXtTiny", "pixels", 224, 768, _CONVNEXT),
    Network("ConvNeXtSmall", "pixels", 224, 768, _CONVNEXT),
    Network("ConvNeXtBase", "pixels", 224, 1024, _CONVNEXT),
    Network("ConvNeXtLarge", "pixels", 224, 1536, _CONVNEXT),
    Network("ConvNeXtXLarge", "pixels", 224, 2048, _CONVNEXT),
)

NETWORKS: Mapping[str, Network] = {network.constructor.lower(): network for network in _ALL}
