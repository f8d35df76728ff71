"""The networks of keras.applications, with Keras' own weights or from a file."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from zoo.errors import OptionError, WeightsError
from zoo_keras.backend import building, keras
from zoo_keras.network import KerasNet, Mode
from zoo_keras.table import NETWORKS

# What Keras divides EfficientNet's pixels by once more, but only where it fetches the weights.
_CORRECTION = (0.229**0.5, 0.224**0.5, 0.225**0.5)


def build(
    *,
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    include_top: bool = True,
    weights_file: str | None = None,
) -> KerasNet:
    """A network of keras.applications, its preprocessing inside.

    num_classes: of a fresh head; None keeps the 1,000 of ImageNet. image_size: side of the square
    it looks at, by default that of Keras' weights. Raises WeightsError when the weights cannot be
    had or do not fit, OptionError for a size that the network cannot take.

    Options:
        include_top: keep what comes between the last feature maps and the classifier, as VGG's
            dense layers, which fit one image size; without it there is no pretrained classifier
        weights_file: the weights' .weights.h5, .keras or .h5 file, in place of Keras' download
    """
    size = image_size or NETWORKS[name].size
    with building():
        if not pretrained:
            net = _adapted(name, _keras_model(name, size, in_chans, include_top), size)
        elif in_chans != 3:
            raise WeightsError(f"the weights of keras/{name} are for 3 channels, not {in_chans}; "
                               "pass in_chans=3 or pretrained=False")
        elif weights_file is not None:
            net = _from_file(name, Path(weights_file).expanduser(), size, include_top, num_classes)
        else:
            net = _downloaded(name, size, include_top)
    if net.num_classes == 1000:
        from timm.data import ImageNetInfo

        net.label_names = tuple(ImageNetInfo("imagenet-1k").label_names())
    if num_classes not in (None, net.num_classes):
        net.reset_classifier(num_classes)
    # What builds it again, now that the file's tensors are in the network.
    net.options = {"include_top": include_top, "weights_file": None}
    return net


def _keras_model(
    name: str, size: int, in_chans: int, include_top: bool, classes: int = 1000,
    weights: str | None = None,
) -> Any:
    constructor = getattr(keras.applications, NETWORKS[name].constructor)
    top = {"classes": classes, "classifier_activation": None} if include_top else {"pooling": "avg"}
    try:
        return constructor(weights=weights, include_top=include_top,
                           input_shape=(size, size, in_chans), **top)
    except ValueError as error:
        if "size must be at least" not in str(error) and "negative dimension" not in str(error):
            raise
        raise OptionError(f"keras/{name}", f"image_size is {size}, which it cannot take: "
                          f"{_first_line(error)}") from error


def _adapted(name: str, model: Any, size: int) -> KerasNet:
    mode = NETWORKS[name].mode
    return KerasNet(model, mode=cast(Mode, mode), size=(size, size), fold_scaling=mode == "pixels")


def _downloaded(name: str, size: int, include_top: bool) -> KerasNet:
    """With the weights that Keras fetches, or finds in its cache, at the size that they are for;
    then, where another is asked for, the same tensors at that one."""
    native = NETWORKS[name].size
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Keras says there that it downloads
            model = _keras_model(name, native, 3, include_top, weights="imagenet")
    except Exception as error:
        raise WeightsError(
            f"the weights of keras/{name} cannot be had ({_first_line(error)}); fetch them once "
            "while online (Keras keeps them in ~/.keras/models), pass weights_file=, or "
            "pretrained=False for random weights") from error
    net = _adapted(name, model, native)
    if size != native:
        fetched, net = net, _adapted(name, _keras_model(name, size, 3, include_top), size)
        net.preprocessing = fetched.preprocessing.at(size)
        try:
            net.load_state_dict(fetched.state_dict())
        except RuntimeError as error:
            raise WeightsError(
                f"the weights of keras/{name} have dense layers for {native} pixels, and image_size"
                f" is {size}; pass include_top=False, or leave image_size out: a member resizes "
                "what it is given") from error
    net.source = {"package": "keras", "version": metadata.version("keras"),
                  "weights": "imagenet"}
    return net


def _from_file(
    name: str, file: Path, size: int, include_top: bool, num_classes: int | None
) -> KerasNet:
    """With the weights of a file, whose classifier counts ImageNet's classes or num_classes."""
    if not file.is_file():
        raise WeightsError(f"there is no file {file} with the weights of keras/{name}")
    problem: Exception | None = None
    for classes in dict.fromkeys((num_classes or 1000, 1000)) if include_top else (0,):
        model = _keras_model(name, size, 3, include_top, classes)
        try:
            model.load_weights(file)
        except Exception as error:
            problem = problem or error
            continue
        net = _adapted(name, model, size)
        if NETWORKS[name].constructor.startswith("EfficientNetB") and any(net.preprocessing.mean):
            std = [one * more for one, more in
                   zip(net.preprocessing.std, _CORRECTION, strict=True)]
            net.preprocessing = replace(net.preprocessing, std=tuple(std))
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        net.source = {"file": file.name, "sha256": digest}
        return net
    assert problem is not None
    raise WeightsError(
        f"{file} does not fit keras/{name} ({_first_line(problem)}); is it of this network, for "
        f"image_size={size}? Pass num_classes= as many as its classifier counts, or "
        f"include_top={not include_top}") from problem


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
