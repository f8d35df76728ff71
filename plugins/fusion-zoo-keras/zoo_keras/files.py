"""A user's own Keras model, from a `.keras` file or a whole-model `.h5`."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

from zoo.errors import OptionError, WeightsError
from zoo_keras.backend import building, keras
from zoo_keras.network import KerasNet, Mode

_NAME = "keras/file"


def build(
    *,
    num_classes: int | None,
    pretrained: bool,
    in_chans: int = 3,
    image_size: int | None = None,
    path: str | None = None,
    architecture: dict[str, Any] | None = None,
    mode: Mode = "pixels",
) -> KerasNet:
    """A Functional or Sequential Keras model, with the weights of its file (pretrained) or random.

    num_classes: of a fresh head; None keeps the model's own softmax or linear one. image_size: only
    for a model that leaves its input's size open. Raises WeightsError when the file cannot be read,
    OptionError when the model in it is not one that can be a member.

    Options:
        path: the .keras file, or the whole-model .h5; with architecture, also a .weights.h5
        architecture: the model as keras.saving.serialize_keras_object describes it, by default the
            file's own; it is what a saved member carries in place of the path
        mode: what the model wants of pixels: pixels (0 to 255, as Keras loads images), unit
            (0 to 1), or caffe, tf, torch as in Keras' preprocess_input
    """
    file = None if path is None else Path(path).expanduser()
    if file is None and (architecture is None or pretrained):
        raise OptionError(_NAME, "it needs path=, your .keras file")
    with building():
        if architecture is None:
            assert file is not None
            model = _read(file)
            architecture = keras.saving.serialize_keras_object(model)
            if not pretrained:
                model = _described(architecture)
        else:
            model = _described(architecture)
            if pretrained:
                assert file is not None
                _load_weights(model, file)
        size = _checked_size(model, in_chans, image_size)
        net = KerasNet(model, mode=mode, size=size)
    if num_classes is None and net.answers not in ("", "softmax", "linear"):
        raise OptionError(_NAME, f"the model answers by {net.answers}, expected softmax or logits; "
                          "pass num_classes= for a fresh head")
    if num_classes not in (None, net.num_classes):
        net.reset_classifier(num_classes)
    if pretrained:
        assert file is not None
        net.source = {"file": file.name, "sha256": _sha256(file)}
    # What builds it again, without the file.
    net.options = {"path": None, "architecture": architecture, "mode": mode}
    return net


def _read(file: Path) -> Any:
    if file.is_dir():
        raise WeightsError(f"{file} is a folder: a SavedModel of TensorFlow can only be read by "
                           "TensorFlow; there, save the model as a .keras file")
    if not file.is_file():
        raise WeightsError(f"there is no file {file}")
    if file.name.endswith(".weights.h5"):
        raise WeightsError(f"{file} has weights without an architecture; pass architecture=, or "
                           "give it to a network of keras.applications as weights_file=")
    if file.suffix not in (".keras", ".h5", ".hdf5"):
        raise WeightsError(f"{file} is not a Keras file; it must be a .keras file or a whole-model "
                           ".h5, and other formats of TensorFlow can only be read by TensorFlow")
    try:
        return keras.saving.load_model(file, compile=False, safe_mode=True)
    except Exception as error:
        raise WeightsError(_unreadable(str(file), error)) from error


def _described(architecture: dict[str, Any]) -> Any:
    try:
        # Keras empties what it is given.
        return keras.saving.deserialize_keras_object(copy.deepcopy(architecture), safe_mode=True)
    except Exception as error:
        raise WeightsError(_unreadable("the architecture", error)) from error


def _load_weights(model: Any, file: Path) -> None:
    try:
        model.load_weights(file)
    except Exception as error:
        raise WeightsError(f"{file} does not fit the architecture: {_first_line(error)}") from error


def _unreadable(what: str, error: Exception) -> str:
    """Keras' reason, and what to do: it runs no code from a file, and neither do we."""
    problem = str(error)
    if "ambda" in problem and "unsafe" in problem:
        return (f"{what} has a Lambda layer, which is Python code, and code from a file is not "
                "run; replace it by a registered layer and save the model again")
    if "Could not locate" in problem or "Unknown" in problem:
        return (f"{what} needs a class of its own ({_first_line(error)}); import the module that "
                "registers it with keras.saving.register_keras_serializable, then try again")
    return f"{what} cannot be read: {_first_line(error)}"


def _checked_size(model: Any, in_chans: int, image_size: int | None) -> tuple[int, int]:
    """The height and width of what it looks at."""
    if not isinstance(model, (keras.Sequential, keras.Function)) or not model.inputs:
        raise OptionError(_NAME, f"{type(model).__name__} is a model whose layers cannot be seen; "
                          "expected a Functional or Sequential one with an Input")
    shapes = [tuple(tensor.shape) for tensor in model.inputs]
    if len(shapes) != 1 or len(shapes[0]) != 4 or len(model.outputs) != 1:
        raise OptionError(_NAME, f"the model takes {shapes} and has {len(model.outputs)} outputs; "
                          "expected one image (batch, height, width, channels) and one output")
    _, height, width, channels = shapes[0]
    if channels != in_chans:
        raise OptionError(_NAME, f"the model takes (batch, height, width, channels) {shapes[0]}, "
                          f"and in_chans is {in_chans}; pass in_chans={channels}")
    if height is None or width is None:
        if image_size is None:
            raise OptionError(_NAME, "the model leaves its input's size open; pass image_size=")
        return image_size, image_size
    if image_size is not None and (height, width) != (image_size, image_size):
        raise OptionError(_NAME, f"the model takes {height} × {width} pixels, and image_size is "
                          f"{image_size}; leave it out: a member resizes what it is given")
    return height, width


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
