"""The networks of keras.applications as members, against Keras itself."""

from __future__ import annotations

import copy
import inspect
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from zoo.errors import OptionError, WeightsError
from zoo.testing import checks
from zoo_keras import applications
from zoo_keras.backend import building, keras
from zoo_keras.network import KerasNet
from zoo_keras.table import NETWORKS

# Keras 3.15 under numpy 2, when it writes a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

MODES = {"vgg16": 32, "resnet50": 32, "inceptionv3": 75, "mobilenetv3small": 32,
         "efficientnetb0": 32, "convnexttiny": 32}


def net_of(model: zoo.Model) -> Any:
    return next(model.each_member()).net


def mobilenet(**arguments: Any) -> zoo.Model:
    given: dict[str, Any] = {"num_classes": 10, "image_size": 32, "device": "cpu", "seed": 0}
    model = zoo.backbone("keras/mobilenet", **{**given, **arguments})
    for module in model.modules() if "pretrained" not in arguments else ():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)  # or the signal of a fresh one dies on its way
    return model


def keras_model(name: str, side: int, **arguments: Any) -> Any:
    """Keras' own, with statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    with building():
        model = getattr(keras.applications, NETWORKS[name].constructor)(
            weights=None, input_shape=(side, side, 3), classifier_activation=None, **arguments)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            width = layer.moving_mean.shape
            layer.moving_mean.assign(torch.rand(width) - 0.5)
            layer.moving_variance.assign(torch.rand(width) + 0.5)
            layer.beta.assign(torch.rand(width) - 0.5)
    return model


@torch.no_grad()
def keras_answer(model: Any, name: str, images: Tensor) -> Tensor:
    family = sys.modules[getattr(keras.applications, NETWORKS[name].constructor).__module__]
    pixels = (images * 255).permute(0, 2, 3, 1).contiguous()
    answer: Tensor = model(family.preprocess_input(pixels), training=False)  # type: ignore[attr-defined]
    return answer


def normalised(net: KerasNet, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1)
                 for values in (net.preprocessing.mean, net.preprocessing.std))
    return (images - mean) / std


def test_the_table_has_every_network_of_keras_but_nasnet() -> None:
    constructors = {name for name, member in vars(keras.applications).items()
                    if inspect.isfunction(member)}
    assert {network.constructor for network in NETWORKS.values()} == {
        name for name in constructors if not name.startswith("NASNet")}
    with pytest.raises(ValueError, match="not available with the torch backend"):
        keras.applications.NASNetMobile(weights=None)


def test_names_are_listed_without_keras() -> None:
    script = ("import sys, zoo; assert 'keras/resnet50' in zoo.list_backbones('keras/*'); "
              "zoo.info('keras/file'); assert not {'keras', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", MODES)
def test_answers_equal_those_of_keras_and_its_preprocessing(name: str) -> None:
    side = MODES[name]
    model = keras_model(name, side)
    images = torch.rand(2, 3, side, side)
    expected = keras_answer(model, name, images)
    mode: Any = NETWORKS[name].mode
    net = KerasNet(model, mode=mode, size=(side, side), fold_scaling=mode == "pixels").eval()
    with torch.no_grad():
        maps = net.forward_features(normalised(net, images))
        features = net.forward_head(maps, pre_logits=True)
        logits = net(normalised(net, images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)
    assert maps.shape[:2] == (2, net.num_features)
    assert maps.ndim == 4
    assert features.shape == (2, NETWORKS[name].features)
    assert torch.equal(net.head(features), logits)


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "inceptionv3", "efficientnetb0"])
def test_the_named_networks_build_by_name(name: str) -> None:
    side = MODES[name]
    model = zoo.backbone(f"keras/{name}", num_classes=3, image_size=side, include_top=False,
                         device="cpu").eval()
    assert model(torch.rand(1, 3, side, side)).shape == (1, 3)


@pytest.mark.parametrize("check", [
    pytest.param(check, id=check.id, marks=[pytest.mark.xfail(
        reason="Keras' layers do not trace into one graph", strict=True)]
        if check.name == "network_compiles_and_autocasts" else [])
    for check in checks("keras") if check.subject in ("keras", "keras/mobilenet")])
def test_conformance(check: Any) -> None:
    check()


def test_random_weights_follow_zoos_seed_and_leave_pythons_alone() -> None:
    random.seed(5)
    before = random.getstate()
    one, same, other = (net_of(mobilenet(seed=seed)).state_dict() for seed in (1, 1, 2))
    key = "trunk.layers.0.kernel"
    assert torch.equal(one[key], same[key])
    assert not torch.equal(one[key], other[key])
    assert random.getstate() == before


def test_statistics_are_buffers_whatever_is_trained() -> None:
    model = mobilenet()
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    moving = [name for name in model.state_dict() if "running" in name]
    assert moving
    assert not parameters.keys() & set(moving)
    assert not any(buffer.requires_grad for buffer in model.buffers())


@pytest.mark.parametrize(("norms", "moves"), [("frozen", False), ("train", True)])
def test_finetune_trains_and_moves_statistics_only_when_told_to(norms: str, moves: bool) -> None:
    model = mobilenet()
    before = copy.deepcopy(net_of(model).state_dict())
    zoo.transfer(model, zoo.load_data("digits").take(32), "finetune", norms=norms, epochs=1,
                 batch_size=16)
    after = net_of(model).state_dict()
    for key in before:
        if "running" in key:
            assert torch.equal(before[key], after[key]) is not moves, key
    assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("kernel"))


def test_linear_probe_trains_the_head_alone() -> None:
    model = mobilenet()
    before = copy.deepcopy(net_of(model).state_dict())
    zoo.transfer(model, zoo.load_data("digits").take(32), "linear_probe", epochs=1, batch_size=16)
    changed = {key for key, tensor in net_of(model).state_dict().items()
               if not torch.equal(tensor, before[key])}
    assert changed == {"head.weight", "head.bias"}


def test_a_copy_learns_without_its_original() -> None:
    model = mobilenet().eval()
    images = torch.rand(2, 3, 32, 32)
    expected = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), expected)
    twin.train()(images).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= parameter.grad
    assert not torch.equal(twin.eval()(images), expected)
    assert torch.equal(model(images), expected)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_fusion_with_timm_trains_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    other = zoo.backbone("timm/mobilenetv3_small_050", num_classes=10, image_size=32, device="cpu",
                         seed=0)
    model = zoo.fuse([mobilenet(), other], "concat")
    zoo.transfer(model, zoo.load_data("digits").take(32), "finetune", epochs=1, batch_size=16)
    zoo.save(model, tmp_path / "fused")
    images = torch.rand(2, 3, 32, 32)
    loaded = zoo.load(tmp_path / "fused", device="cpu")
    assert torch.equal(loaded(images), model.eval()(images))
    keys = load_file(tmp_path / "fused" / "model.safetensors")
    assert "members.0.net.trunk.layers.1.running_mean" in keys
    zoo.transfer(loaded, zoo.load_data("digits").take(16), "finetune", epochs=1, batch_size=16)
    assert not torch.equal(loaded.eval()(images), model(images))


def test_outputs_fuse() -> None:
    other = zoo.backbone("mnist_cnn", num_classes=10, device="cpu", seed=0)
    answer = zoo.fuse([mobilenet(), other], "mean")(torch.rand(2, 3, 32, 32))
    assert torch.allclose(answer.exp().sum(1), torch.ones(2), atol=1e-5)


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
def test_an_average_pools_batch_norm_as_torchs() -> None:
    members = [mobilenet(seed=seed) for seed in (1, 2)]
    for shift, member in enumerate(members):
        net_of(member).trunk.layers[1].running_mean.fill_(float(shift))
    fused = net_of(zoo.fuse(members, "average"))
    one, other = (net_of(member) for member in members)
    assert torch.allclose(fused.trunk.layers[0].kernel,
                          (one.trunk.layers[0].kernel + other.trunk.layers[0].kernel) / 2)
    assert torch.all(fused.trunk.layers[1].running_mean == 0.5)
    assert torch.allclose(fused.trunk.layers[1].running_var, torch.tensor(1.25))  # 1 + ½² between


def test_bfloat16_and_autocast() -> None:
    images = torch.rand(2, 3, 32, 32)
    exact = mobilenet().eval()
    rounded = mobilenet(dtype="bfloat16").eval()
    assert rounded(images).dtype == torch.bfloat16
    assert torch.allclose(rounded(images).float(), exact(images), atol=0.05)
    expected = exact(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(exact(images).float(), expected, atol=0.05)


def test_a_classifier_can_be_replaced_and_taken_off() -> None:
    net = net_of(mobilenet())
    assert (net.num_classes, net.head_hidden_size, net.num_features) == (10, 1024, 1024)
    net.reset_classifier(4)
    assert net.get_classifier().out_features == net.num_classes == 4
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert net.num_classes == 0
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 1024)


def test_imagenets_names_come_with_its_classes() -> None:
    assert mobilenet(num_classes=None).classes[0] == "n01440764"
    assert mobilenet().classes == tuple(map(str, range(10)))


def test_a_size_below_the_networks_own_least() -> None:
    with pytest.raises(OptionError, match=r"keras/mobilenet: image_size is 16, which it cannot "
                       r"take: Input size must be at least 32x32"):
        mobilenet(image_size=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Weights for four classes, and Keras' own model with them."""
    model = keras_model("mobilenet", 32, classes=4)
    file = tmp_path_factory.mktemp("weights") / "mine.weights.h5"
    model.save_weights(file)
    return file, model


class TestWeightsFile:
    def pretrained(self, file: Path, **arguments: Any) -> zoo.Model:
        return mobilenet(pretrained=True, weights_file=str(file), num_classes=None,
                         **arguments).eval()

    def test_keeps_a_classifier_of_its_own(self, trained: tuple[Path, Any]) -> None:
        file, keras_own = trained
        model = mobilenet(pretrained=True, weights_file=str(file), num_classes=4).eval()
        images = torch.rand(2, 3, 32, 32)
        expected = keras_answer(keras_own, "mobilenet", images)
        torch.testing.assert_close(model(images).detach(), expected, rtol=1e-4, atol=1e-6)
        source = next(model.each_member()).source
        assert source["file"] == "mine.weights.h5"
        assert len(source["sha256"]) == 64
        assert net_of(model).options == {"include_top": True, "weights_file": None}

    def test_a_fresh_classifier_for_other_classes(self, tmp_path: Path) -> None:
        own = keras_model("mobilenet", 32)
        own.save_weights(tmp_path / "imagenet.weights.h5")
        model = mobilenet(pretrained=True, weights_file=str(tmp_path / "imagenet.weights.h5"),
                          num_classes=3)
        kernel = own.get_layer("conv1").kernel.value
        assert torch.equal(net_of(model).trunk.layers[0].kernel, kernel)
        assert len(model.classes) == 3

    def test_without_its_top(self, tmp_path: Path) -> None:
        with building():
            own = keras.applications.MobileNet(weights=None, input_shape=(32, 32, 3),
                                               include_top=False)
        own.save_weights(tmp_path / "notop.weights.h5")
        with pytest.raises(WeightsError, match=r"notop.weights.h5 does not fit keras/mobilenet \(.+"
                           r"\); is it of this network, for image_size=32\? Pass num_classes= as "
                           r"many as its classifier counts, or include_top=False"):
            self.pretrained(tmp_path / "notop.weights.h5")
        model = mobilenet(pretrained=True, weights_file=str(tmp_path / "notop.weights.h5"),
                          include_top=False)
        assert len(model.classes) == 10

    def test_efficientnets_statistics_become_imagenets(self, tmp_path: Path) -> None:
        own = keras_model("efficientnetb0", 32)
        scaling = next(layer for layer in own.layers
                       if isinstance(layer, keras.layers.Normalization))
        # As in Keras' published file: the standard deviation stands in place of the variance.
        scaling.set_weights([torch.tensor([0.485, 0.456, 0.406]),
                             torch.tensor([0.229, 0.224, 0.225]), torch.tensor(1)])
        own.save_weights(tmp_path / "b0.weights.h5")
        model = zoo.backbone("keras/efficientnetb0", pretrained=True, image_size=32, device="cpu",
                             weights_file=str(tmp_path / "b0.weights.h5"))
        preprocessing = next(model.each_member()).preprocessing
        assert preprocessing is not None
        assert preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
        assert preprocessing.std == pytest.approx((0.229, 0.224, 0.225))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"there is no file .*none.weights.h5 with the "
                           r"weights of keras/mobilenet"):
            self.pretrained(tmp_path / "none.weights.h5")

    def test_other_channels(self, trained: tuple[Path, Any]) -> None:
        with pytest.raises(WeightsError, match="the weights of keras/mobilenet are for 3 channels, "
                           "not 1; pass in_chans=3 or pretrained=False"):
            self.pretrained(trained[0], in_chans=1)


# Keras' own loading, in a process of its own: Keras reads KERAS_HOME once. No network: whatever is
# not in the cache is asked for at a port where nobody listens.
PRETRAINED = """
import torch, zoo
from zoo.errors import WeightsError
from zoo_keras import applications
from zoo_keras.backend import keras

own = keras.applications.MobileNet(classifier_activation=None)
images = torch.rand(1, 3, 224, 224)
model = zoo.backbone("keras/mobilenet", pretrained=True, device="cpu").eval()
with torch.no_grad():
    expected = own((images * 2 - 1).permute(0, 2, 3, 1), training=False)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
assert next(model.each_member()).source["weights"] == "imagenet"
smaller = zoo.backbone("keras/mobilenet", pretrained=True, num_classes=3, image_size=32)
one, other = (next(m.each_member()).net.state_dict() for m in (model, smaller))
assert all(torch.equal(one[key], other[key]) for key in one if not key.startswith("head"))
try:
    zoo.backbone("keras/resnet50", pretrained=True)
except WeightsError as error:
    print(error)
"""


def test_pretrained_loads_as_keras_does_and_says_when_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    # A whole model in the legacy format holds the weights as the published file does.
    keras_model("mobilenet", 224).save(tmp_path / "models" / "mobilenet_1_0_224_tf.h5")
    nobody = "http://127.0.0.1:9"
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRETRAINED], capture_output=True, text=True,
        env={**os.environ, "KERAS_HOME": str(tmp_path), "https_proxy": nobody, "no_proxy": ""},
        check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("the weights of keras/resnet50 cannot be had (URL fetch failure")
    assert ran.stdout.endswith("fetch them once while online (Keras keeps them in ~/.keras/models),"
                               " pass weights_file=, or pretrained=False for random weights\n")


def test_dense_layers_fit_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    build = applications._keras_model

    def unfetched(name: str, size: int, *others: Any, weights: str | None = None) -> Any:
        # Half a gigabyte would be fetched for 224 pixels: random weights for 32 stand for it.
        return build(name, 32 if weights else size, *others)

    monkeypatch.setattr(applications, "_keras_model", unfetched)
    with pytest.raises(WeightsError, match="the weights of keras/vgg16 have dense layers for 224 "
                       "pixels, and image_size is 64; pass include_top=False, or leave image_size "
                       "out: a member resizes what it is given"):
        zoo.backbone("keras/vgg16", pretrained=True, image_size=64)


REFUSED = ("the plugin 'keras' (from fusion-zoo-keras) could not be loaded: Keras runs on "
           "'tensorflow' here, expected 'torch'; start a new process with KERAS_BACKEND=torch, "
           "which Keras reads when it is first imported")


@pytest.mark.parametrize("imports", [True, False])
def test_another_backend_is_refused(imports: bool, tmp_path: Path) -> None:
    # A Keras that runs on TensorFlow, for a machine that has none.
    (tmp_path / "keras.py").write_text("class config:\n    backend = staticmethod("
                                       "lambda: 'tensorflow')\n")
    environment = {"PYTHONPATH": str(tmp_path)} if imports else {"KERAS_BACKEND": "tensorflow"}
    script = f"{'import keras' * imports}\nimport zoo_keras.backend"
    kept = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env={**kept, **environment}, check=False)
    assert ran.stderr.rstrip().endswith(REFUSED)
