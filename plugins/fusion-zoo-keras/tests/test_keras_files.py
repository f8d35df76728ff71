"""A user's own Keras files: which can be read, and what is said of those that cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from zoo.errors import OptionError, WeightsError
from zoo_keras.backend import building, keras

# Keras 3.15 under numpy 2, when it writes a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

SIDE = 12
layers = keras.layers


def sequential(*between: Any, classes: int = 3, activation: str = "softmax") -> Any:
    return keras.Sequential([
        keras.Input((SIDE, SIDE, 3)), layers.Rescaling(1 / 255), layers.Conv2D(4, 3),
        layers.BatchNormalization(), layers.ReLU(), *between, layers.GlobalAveragePooling2D(),
        layers.Dense(classes, activation=activation)])


def branched() -> Any:
    """Branches, a layer that is used twice, a model inside the model, an operation, attention."""
    image = keras.Input((SIDE, SIDE, 3))
    inner_in = keras.Input((SIDE, SIDE, 4))
    inner = keras.Model(inner_in, layers.BatchNormalization()(
        layers.Conv2D(4, 3, padding="same")(inner_in)))
    x = layers.Conv2D(4, 1)(layers.Rescaling(1 / 255)(image))
    twice = layers.Conv2D(4, 1)
    x = layers.Add()([inner(x, training=False), twice(twice(x))])
    x = keras.ops.relu(x) + x
    x = layers.Concatenate()([x, layers.SpectralNormalization(layers.Conv2D(2, 1))(x)])
    tokens = layers.Reshape((-1, 6))(x)
    tokens = layers.MultiHeadAttention(2, 3)(tokens, tokens)
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling1D()(tokens))
    return keras.Model(image, layers.Softmax()(layers.Dense(3)(x)))


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def probabilities(model: Any) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model((images() * 255).permute(0, 2, 3, 1), training=False)
    return answer


def member(file: Path, **arguments: Any) -> zoo.Model:
    given: dict[str, Any] = {"pretrained": True, "device": "cpu", **arguments}
    return zoo.backbone("keras/file", path=str(file), **given).eval()


def net_of(model: zoo.Model) -> Any:
    return next(model.each_member()).net


def saved(model: Any, file: Path) -> Path:
    model.save(file)
    return file


# Keras' legacy format cannot hold a model with operations.
@pytest.mark.parametrize(("make", "name"), [
    (sequential, "model.keras"), (sequential, "model.h5"), (branched, "model.keras")])
def test_whole_models_answer_as_in_keras(
    make: Callable[[], Any], name: str, tmp_path: Path
) -> None:
    own = make()
    file = saved(own, tmp_path / name)
    model = member(file)
    torch.testing.assert_close(model(images()).softmax(1).detach(), probabilities(own))
    assert model.classes == ("0", "1", "2")
    source = next(model.each_member()).source
    assert source["file"] == name
    assert len(source["sha256"]) == 64


def test_a_file_that_tensorflow_2_wrote(tmp_path: Path) -> None:
    """tf.keras 2's layout: `batch_input_shape`, plain class names, `kernel:0`."""
    kernel, bias = np.random.default_rng(0).normal(size=(3, 3, 3, 4)), np.ones(4)
    dense = np.random.default_rng(1).normal(size=(4, 3))
    config = {"class_name": "Sequential", "config": {"name": "sequential", "layers": [
        {"class_name": "InputLayer", "config": {
            "batch_input_shape": [None, SIDE, SIDE, 3], "dtype": "float32", "sparse": False,
            "ragged": False, "name": "input_1"}},
        {"class_name": "Conv2D", "config": {
            "name": "conv2d", "trainable": True, "dtype": "float32", "filters": 4,
            "kernel_size": [3, 3], "strides": [1, 1], "padding": "valid",
            "data_format": "channels_last", "dilation_rate": [1, 1], "groups": 1,
            "activation": "relu", "use_bias": True}},
        {"class_name": "GlobalAveragePooling2D", "config": {
            "name": "pool", "trainable": True, "dtype": "float32",
            "data_format": "channels_last", "keepdims": False}},
        {"class_name": "Dense", "config": {
            "name": "dense", "trainable": True, "dtype": "float32", "units": 3,
            "activation": "softmax", "use_bias": False}}]}}
    with h5py.File(tmp_path / "tf.h5", "w") as file:
        file.attrs.update(backend="tensorflow", keras_version="2.15.0",
                          model_config=json.dumps(config))
        weights = file.create_group("model_weights")
        weights.attrs.update(layer_names=[b"conv2d", b"pool", b"dense"], backend="tensorflow",
                             keras_version="2.15.0")
        for layer, tensors in (("conv2d", {"kernel": kernel, "bias": bias}), ("pool", {}),
                               ("dense", {"kernel": dense})):
            group = weights.create_group(layer)
            group.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in tensors]
            for name, values in tensors.items():
                group[f"{layer}/{name}:0"] = values.astype("float32")
    model = member(tmp_path / "tf.h5")
    pixels = images() * 255
    weight = torch.from_numpy(kernel).float().permute(3, 2, 0, 1)
    maps = torch.nn.functional.conv2d(pixels, weight, torch.from_numpy(bias).float()).relu()
    expected = maps.mean((2, 3)) @ torch.from_numpy(dense).float()
    torch.testing.assert_close(model(images()).detach(), expected, rtol=1e-4, atol=1e-3)


def test_a_saved_member_does_not_need_the_file(tmp_path: Path) -> None:
    file = saved(branched(), tmp_path / "model.keras")
    model = member(file)
    zoo.save(model, tmp_path / "saved")
    file.unlink()
    assert torch.equal(zoo.load(tmp_path / "saved", device="cpu")(images()), model(images()))
    assert str(file) not in (tmp_path / "saved" / "config.json").read_text()


def test_a_saved_member_of_a_described_architecture(tmp_path: Path) -> None:
    own = branched()
    own.save_weights(tmp_path / "mine.weights.h5")
    described = keras.saving.serialize_keras_object(own)
    model = member(tmp_path / "mine.weights.h5", architecture=described)
    torch.testing.assert_close(model(images()).softmax(1).detach(), probabilities(own))
    assert json.loads(json.dumps(net_of(model).options)) == {
        "path": None, "architecture": json.loads(json.dumps(described)), "mode": "pixels"}
    zoo.save(model, tmp_path / "saved")
    (tmp_path / "mine.weights.h5").unlink()
    assert torch.equal(zoo.load(tmp_path / "saved", device="cpu")(images()), model(images()))


def test_without_pretrained_the_weights_are_fresh(tmp_path: Path) -> None:
    file = saved(sequential(), tmp_path / "model.keras")
    one, same = (member(file, pretrained=False, seed=1) for _ in range(2))
    assert torch.equal(one(images()), same(images()))
    assert not torch.equal(one(images()), member(file)(images()))


def test_statistics_that_were_adapted_are_saved_and_restored(tmp_path: Path) -> None:
    scaling = layers.Normalization()
    scaling.adapt(np.random.default_rng(0).normal(100, 20, size=(64, SIDE, SIDE, 3)))
    own = keras.Sequential([keras.Input((SIDE, SIDE, 3)), scaling,
                            layers.GlobalAveragePooling2D(), layers.Dense(3)])
    model = member(saved(own, tmp_path / "model.keras"))
    torch.testing.assert_close(model(images()).detach(), probabilities(own))
    fresh = member(tmp_path / "model.keras", pretrained=False)
    net_of(fresh).load_state_dict(net_of(model).state_dict(), assign=True)
    assert torch.equal(fresh(images()), model(images()))


def test_a_kernel_that_was_frozen_in_keras_trains_here(tmp_path: Path) -> None:
    own = sequential()
    own.layers[1].trainable = False
    parameters = dict(member(saved(own, tmp_path / "model.keras")).named_parameters())
    assert sum(name.endswith("kernel") for name in parameters) == 1


def test_state_that_a_layer_changes_in_training_is_kept(tmp_path: Path) -> None:
    model = member(saved(branched(), tmp_path / "model.keras")).train()
    before = copy.deepcopy(net_of(model).state_dict())
    model(images()).sum().backward()
    changed = {key for key, tensor in net_of(model).state_dict().items()
               if not torch.equal(tensor, before[key])}
    assert any(key.endswith("vector_u") for key in changed)
    assert any(key.endswith("running_var") for key in changed)
    # Spectral norm replaces the kernel by its normalised self; torch trains what it is given.
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_noise_is_drawn_anew_in_training_and_absent_otherwise(tmp_path: Path) -> None:
    file = saved(sequential(layers.GaussianNoise(0.5)), tmp_path / "model.keras")
    model = member(file).train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert not torch.equal(model(images()), model(images()))
    assert torch.equal(model.eval()(images()), model(images()))


def test_a_model_without_classifier_gives_its_maps(tmp_path: Path) -> None:
    own = keras.Sequential([keras.Input((SIDE, SIDE, 3)), layers.Conv2D(5, 3)])
    file = saved(own, tmp_path / "model.keras")
    model = member(file, num_classes=2)
    assert (model.dim, model.classes) == (5, ("0", "1"))
    with torch.no_grad():
        maps = own((images() * 255).permute(0, 2, 3, 1))
    torch.testing.assert_close(model.embed(images()).detach(), maps.mean((1, 2)))


def test_a_size_that_is_left_open(tmp_path: Path) -> None:
    own = keras.Sequential([keras.Input((None, None, 3)), layers.GlobalAveragePooling2D(),
                            layers.Dense(3)])
    file = saved(own, tmp_path / "model.keras")
    assert member(file, image_size=20).image_size == 20
    with pytest.raises(OptionError, match="the model leaves its input's size open; pass "
                       "image_size="):
        member(file)


@pytest.mark.parametrize("mode", ["caffe", "tf", "torch"])
def test_modes_are_those_of_keras(mode: str, tmp_path: Path) -> None:
    own = keras.Sequential([keras.Input((SIDE, SIDE, 3)), layers.Conv2D(4, 3), layers.Flatten(),
                            layers.Dense(3)])
    model = member(saved(own, tmp_path / "model.keras"), mode=mode)
    pixels = (images() * 255).permute(0, 2, 3, 1).contiguous()
    with torch.no_grad():
        expected = own(keras.applications.imagenet_utils.preprocess_input(pixels, mode=mode))
    torch.testing.assert_close(model(images()).detach(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"in_chans": 1}, r"the model takes \(batch, height, width, channels\) \(None, 12, 12, 3\), "
     "and in_chans is 1; pass in_chans=3"),
    ({"image_size": 20}, "the model takes 12 × 12 pixels, and image_size is 20; leave it out: a "
     "member resizes what it is given"),
    ({"mode": "grey"}, "the option 'mode' is 'grey'"),
])
def test_options_that_do_not_fit(arguments: Any, problem: str, tmp_path: Path) -> None:
    file = saved(sequential(), tmp_path / "model.keras")
    with pytest.raises(OptionError, match=f"keras/file: {problem}"):
        member(file, **arguments)


def test_no_path() -> None:
    with pytest.raises(OptionError, match=r"keras/file: it needs path=, your .keras file"):
        zoo.backbone("keras/file")


def test_an_answer_that_is_not_one_of_many(tmp_path: Path) -> None:
    file = saved(sequential(classes=1, activation="sigmoid"), tmp_path / "model.keras")
    with pytest.raises(OptionError, match="the model answers by sigmoid, expected softmax or "
                       "logits; pass num_classes= for a fresh head"):
        member(file)
    assert member(file, num_classes=2)(images()).shape == (2, 2)


def test_two_inputs(tmp_path: Path) -> None:
    one, other = keras.Input((SIDE, SIDE, 3)), keras.Input((2,))
    own = keras.Model([one, other], layers.Dense(3)(layers.Concatenate()(
        [layers.Flatten()(one), other])))
    with pytest.raises(OptionError, match=r"the model takes \[\(None, 12, 12, 3\), \(None, 2\)\] "
                       r"and has 1 outputs; expected one image"):
        member(saved(own, tmp_path / "model.keras"))


def test_a_layer_with_two_outputs(tmp_path: Path) -> None:
    image = keras.Input((SIDE, SIDE, 4))
    one, other = keras.ops.split(image, 2, axis=-1)
    own = keras.Model(image, layers.Dense(3)(layers.Flatten()(one + other)))
    with pytest.raises(OptionError, match=r"its layer 'split.*' has several outputs, and only "
                       "layers with one can be followed"):
        member(saved(own, tmp_path / "model.keras"), in_chans=4)


@keras.saving.register_keras_serializable("tests")
class Doubled(layers.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x * 2


def test_a_layer_of_ones_own_works_while_it_is_registered(tmp_path: Path) -> None:
    own = sequential(Doubled())
    file = saved(own, tmp_path / "model.keras")
    torch.testing.assert_close(member(file)(images()).softmax(1).detach(), probabilities(own))
    registered = keras.saving.get_custom_objects()
    kept = registered.pop("tests>Doubled")
    try:
        with pytest.raises(WeightsError, match=r"model.keras needs a class of its own \(.*\); "
                           r"import the module that registers it with "
                           r"keras.saving.register_keras_serializable, then try again"):
            member(file)
    finally:
        registered["tests>Doubled"] = kept


@keras.saving.register_keras_serializable("tests")
class Hidden(keras.Model):  # type: ignore[misc]
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dense = layers.Dense(3)

    def call(self, x: Any) -> Any:
        return self.dense(keras.ops.mean(x, axis=(1, 2)))


def test_a_subclassed_model(tmp_path: Path) -> None:
    own = Hidden()
    own(torch.rand(1, SIDE, SIDE, 3))
    with pytest.raises(OptionError, match="Hidden is a model whose layers cannot be seen; expected "
                       "a Functional or Sequential one with an Input"):
        member(saved(own, tmp_path / "model.keras"))


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_code_in_a_file_is_not_run(name: str, tmp_path: Path) -> None:
    file = saved(sequential(layers.Lambda(lambda x: x * 2)), tmp_path / name)
    with pytest.raises(WeightsError, match=f"{name} has a Lambda layer, which is Python code, and "
                       "code from a file is not run; replace it by a registered layer"):
        member(file)


def test_files_that_only_tensorflow_reads(tmp_path: Path) -> None:
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "saved_model.pb").touch()
    (tmp_path / "model.tflite").touch()
    with pytest.raises(WeightsError, match=r"saved_model is a folder: a SavedModel of TensorFlow "
                       r"can only be read by TensorFlow; there, save the model as a .keras file"):
        member(tmp_path / "saved_model")
    with pytest.raises(WeightsError, match=r"model.tflite is not a Keras file; it must be a .keras "
                       r"file or a whole-model .h5, and other formats of TensorFlow can only be "
                       r"read by TensorFlow"):
        member(tmp_path / "model.tflite")


def test_weights_alone_damage_and_absence(tmp_path: Path) -> None:
    sequential().save_weights(tmp_path / "mine.weights.h5")
    (tmp_path / "damaged.keras").write_bytes(b"PK")
    with pytest.raises(WeightsError, match=r"mine.weights.h5 has weights without an architecture; "
                       r"pass architecture=, or give it to a network of keras.applications as "
                       r"weights_file="):
        member(tmp_path / "mine.weights.h5")
    with pytest.raises(WeightsError, match=r"damaged.keras cannot be read: "):
        member(tmp_path / "damaged.keras")
    with pytest.raises(WeightsError, match=r"there is no file .*none.keras"):
        member(tmp_path / "none.keras")


def test_weights_of_another_model(tmp_path: Path) -> None:
    sequential(classes=5).save_weights(tmp_path / "five.weights.h5")
    with building():
        described = keras.saving.serialize_keras_object(sequential())
    with pytest.raises(WeightsError, match=r"five.weights.h5 does not fit the architecture: "):
        member(tmp_path / "five.weights.h5", architecture=described)
