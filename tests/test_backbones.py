from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.backbones import Preprocessing
from zoo.backbones.mnist_cnn import build as build_mnist_cnn
from zoo.backbones.semantics import (
    classifier_keys,
    classifier_parameters,
    classify,
    pooled_features,
    same_answer,
)
from zoo.backbones.timm_build import build
from zoo.errors import OptionError, WeightsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Families of the request and their kin, small: name, side in pixels, the classifier's prefix.
FAMILIES = [
    ("resnet18", 32, "fc."),
    ("inception_v3", 75, "fc."),
    ("vit_tiny_patch16_224", 64, "head."),
    ("convnext_atto", 32, "head.fc."),
    ("efficientnet_b0", 32, "classifier."),
    ("mobilenetv3_small_050", 32, "classifier."),
    ("resnetv2_18", 32, "head.fc."),
]
CASES = [(*family, channels) for family in FAMILIES for channels in (1, 3, 5)]


def timm_net(name: str, **arguments: Any) -> Any:
    given: dict[str, Any] = {"num_classes": 7, "pretrained": False, **arguments}
    return build(name=name, **given)


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put random weights of a network where the Hub's client keeps what it has fetched; the
    network is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def _publish(name: str, without: str = "") -> Any:
        net = timm.create_model(name)
        folder = tmp_path / f"models--timm--{name}"
        file = folder / "snapshots" / COMMIT / "model.safetensors"
        file.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        save_file({key: value for key, value in net.state_dict().items() if key != without}, file)
        return net

    return _publish


class TestPreprocessing:
    def test_timms_training_size_and_statistics_are_taken(self) -> None:
        config = timm.get_pretrained_cfg("resnet18.a1_in1k").to_dict()
        assert config["test_input_size"] == (3, 288, 288)
        assert Preprocessing.from_timm(config) == Preprocessing(
            (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (224, 224), "bicubic")

    def test_what_a_config_leaves_out_is_imagenets(self) -> None:
        assert Preprocessing.from_timm({"interpolation": "random"}) == Preprocessing()

    def test_channels_follow_the_first_convolution(self) -> None:
        three = Preprocessing((0.1, 0.2, 0.6), (0.2, 0.3, 0.4))
        assert three.for_channels(3) is three
        assert three.for_channels(1).mean == pytest.approx((0.3,))
        assert three.for_channels(1).std == pytest.approx((0.3,))
        assert three.for_channels(5).mean == (0.1, 0.2, 0.6, 0.1, 0.2)
        assert three.for_channels(2).std == (0.2, 0.3)

    def test_it_survives_json(self) -> None:
        given = Preprocessing((0.5,), (0.25,), (30, 20), "nearest").at(64)
        assert Preprocessing(**json.loads(json.dumps(given.as_dict()))) == given
        assert given.size == (64, 64)

    def test_it_costs_no_torch(self) -> None:
        code = "import sys, zoo.backbones; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestTimm:
    @pytest.mark.parametrize(("name", "side", "head", "channels"), CASES)
    def test_every_family_has_the_same_semantics(
        self, name: str, side: int, head: str, channels: int
    ) -> None:
        net = timm_net(name, in_chans=channels, image_size=side).eval()
        x = torch.rand(2, channels, side, side)
        with torch.no_grad():
            features, logits = pooled_features(net, x), net(x)
        assert features.shape == (2, net.head_hidden_size)
        assert logits.shape == (2, 7)
        assert torch.allclose(classify(net, features), logits, atol=1e-5)
        assert same_answer(net, features, logits)
        assert classifier_keys(net) == (f"{head}weight", f"{head}bias")
        assert [p.shape[0] for p in classifier_parameters(net)] == [7, 7]
        assert net.preprocessing.size == (side, side)
        assert len(net.preprocessing.mean) == channels
        net.reset_classifier(3)
        assert net(x).shape == (2, 3)

    def test_vgg_pools_behind_its_hidden_layers(self) -> None:
        net = timm_net("vgg11", image_size=32, in_chans=5, drop_rate=0.5).eval()
        x = torch.rand(1, 5, 32, 32)
        with torch.no_grad():
            assert pooled_features(net, x).shape == (1, 4096) == (1, net.head_hidden_size)
            assert same_answer(net, pooled_features(net, x), net(x))
        assert net.num_features == 512
        assert net.drop_rate == 0.5
        assert classifier_keys(net) == ("head.fc.weight", "head.fc.bias")

    def test_a_distilled_network_has_two_heads(self) -> None:
        net = timm_net("deit_tiny_distilled_patch16_224", image_size=32).eval()
        x = torch.rand(1, 3, 32, 32)
        with torch.no_grad():
            features = pooled_features(net, x)
            assert features.shape == (1, 192)
            assert not same_answer(net, features, net(x))
        assert classifier_keys(net) == (
            "head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
        assert len(classifier_parameters(net)) == 4

    def test_by_default_the_size_and_the_head_are_the_tags_own(self) -> None:
        net = timm_net("test_vit", num_classes=None)
        assert net.preprocessing.size == (160, 160)
        assert net.num_classes == 1000
        assert net.label_names[0] == "n01440764"
        assert timm_net("test_vit").label_names == ()

    def test_training_mode_and_random_numbers_are_left_alone(self) -> None:
        torch.manual_seed(0)
        native = timm_net("resnet18")
        torch.manual_seed(0)
        small = timm_net("resnet18", image_size=32)
        assert all(module.training for module in small.modules())
        assert all(torch.equal(a, b) for a, b in zip(
            native.state_dict().values(), small.state_dict().values(), strict=True))

    def test_architectures_keep_their_own_drop_rates(self) -> None:
        assert timm_net("ghostnet_050").drop_rate == 0.2
        assert timm_net("ghostnet_050", drop_rate=0.0).drop_rate == 0.0
        deep = timm_net("test_vit", drop_path_rate=0.25)
        assert max(getattr(module, "drop_prob", 0.0) or 0.0 for module in deep.modules()) == 0.25

    @pytest.mark.parametrize(("name", "arguments", "message"), [
        ("inception_v3", {"image_size": 64},
         r"timm/inception_v3: image_size is 64, .*Kernel size.*; give it 75 pixels or more$"),
        ("test_vit", {"image_size": 8}, r"image_size is 8, .*; give it 160 pixels$"),
        ("crossvit_tiny_240", {"image_size": 64}, r"image_size is 64, .*; give it 240 pixels$"),
        ("nest_tiny", {"image_size": 100}, r"image_size is 100, which it cannot take: "),
        ("resnet18", {"image_size": 0}, r"image_size is 0, expected pixels"),
        ("resnet18", {"drop_rate": 1.0}, r"drop_rate is 1.0, expected a share in \[0, 1\)"),
        ("vgg11", {"drop_path_rate": 0.1}, r"timm/vgg11: this architecture has no drop_path_rate"),
    ])
    def test_what_it_cannot_take_is_said(
        self, name: str, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            timm_net(name, **arguments)

    def test_an_encoder_is_refused(self) -> None:
        with torch.device("meta"), pytest.raises(OptionError, match="encoder that cannot classify"):
            timm_net("gemma4_vit_167m_enc")

    def test_a_size_is_not_tried_before_there_are_weights(self) -> None:
        with torch.device("meta"):
            assert timm_net("inception_v3", image_size=64).preprocessing.size == (64, 64)


class TestPretrained:
    def test_weights_are_the_published_ones(self, publish: Callable[..., Any]) -> None:
        published = publish("test_resnet.r160_in1k").state_dict()
        net = timm_net("test_resnet.r160_in1k", pretrained=True, num_classes=None)
        assert all(torch.equal(published[key], value) for key, value in net.state_dict().items())
        sha256 = net.source.pop("sha256")
        assert len(sha256) == 64
        assert net.source == {"repository": "timm/test_resnet.r160_in1k", "revision": COMMIT,
                              "license": "Apache-2.0"}
        assert "file" not in net.pretrained_cfg

    def test_a_fresh_head_leaves_the_trunk(self, publish: Callable[..., Any]) -> None:
        published = publish("test_resnet.r160_in1k").state_dict()
        net = timm_net("test_resnet.r160_in1k", pretrained=True)
        differ = [key for key, value in net.state_dict().items()
                  if not torch.equal(value, published[key])]
        assert tuple(differ) == classifier_keys(net)
        assert net.num_classes == 7

    def test_one_channel_sums_the_weights(self, publish: Callable[..., Any]) -> None:
        colour = publish("test_vit.r160_in1k").patch_embed.proj.weight
        net = timm_net("test_vit.r160_in1k", pretrained=True, in_chans=1)
        torch.testing.assert_close(net.patch_embed.proj.weight, colour.sum(1, keepdim=True))

    def test_positions_are_resampled_to_another_size(self, publish: Callable[..., Any]) -> None:
        published = publish("test_vit.r160_in1k")
        net = timm_net("test_vit.r160_in1k", pretrained=True, image_size=80)
        assert net.pos_embed.shape[1] == 1 + 5 * 5 < published.pos_embed.shape[1]
        assert torch.equal(net.blocks[0].attn.qkv.weight, published.blocks[0].attn.qkv.weight)

    def test_a_first_layer_that_cannot_be_adapted_is_not_left_random(
        self, publish: Callable[..., Any]
    ) -> None:
        publish("tresnet_m.miil_in21k_ft_in1k")
        with pytest.raises(WeightsError, match=r"are for 3 channels and 'body.conv1.conv' cannot "
                           r"be adapted to 5; pass in_chans=3 or pretrained=False"):
            timm_net("tresnet_m.miil_in21k_ft_in1k", pretrained=True, in_chans=5)

    @pytest.mark.parametrize("num_classes", [None, 7])
    def test_a_tensor_that_the_file_lacks_is_not_left_random(
        self, publish: Callable[..., Any], num_classes: int | None
    ) -> None:
        publish("test_resnet.r160_in1k", without="layer1.0.conv1.weight")
        with pytest.raises(WeightsError, match=r"do not fit .* \"layer1.0.conv1.weight\""):
            timm_net("test_resnet.r160_in1k", pretrained=True, num_classes=num_classes)

    def test_weights_that_were_never_fetched_are_an_error(
        self, publish: Callable[..., Any]
    ) -> None:
        with pytest.raises(WeightsError) as caught:
            timm_net("resnet18.a1_in1k", pretrained=True)
        message = str(caught.value)
        assert message.startswith(
            "the weights of timm/resnet18.a1_in1k cannot be had from timm/resnet18.a1_in1k (")
        assert message.endswith("; check the network, fetch them once while online (they are "
                                "cached), or pass pretrained=False for random weights")
        assert "HF_HUB_OFFLINE" in message

    def test_a_damaged_file_is_an_error(
        self, publish: Callable[..., Any], tmp_path: Path
    ) -> None:
        publish("test_resnet.r160_in1k")
        file = next(tmp_path.rglob("model.safetensors"))
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(WeightsError, match=r"cannot be had from timm/test_resnet\S* \(Error"):
            timm_net("test_resnet.r160_in1k", pretrained=True)

    def test_a_pickle_is_not_loaded(self, publish: Callable[..., Any], tmp_path: Path) -> None:
        publish("test_resnet.r160_in1k")
        file = next(tmp_path.rglob("model.safetensors"))
        file.rename(file.with_name("pytorch_model.bin"))
        with pytest.raises(WeightsError, match=r"no model.safetensors, and pickles are not loaded"):
            timm_net("test_resnet.r160_in1k", pretrained=True)

    def test_networks_without_weights_name_the_tags_that_have(self) -> None:
        with pytest.raises(WeightsError, match=r"timm/seresnext101_32x4d.untrained has no published"
                           r" weights; these have: seresnext101_32x4d.gluon_in1k; pass"):
            timm_net("seresnext101_32x4d.untrained", pretrained=True)
        with pytest.raises(WeightsError, match=r"nfnet_f0 has no published weights; pass pret"):
            timm_net("nfnet_f0", pretrained=True)


class TestMnistCnn:
    def test_it_is_the_network_of_the_literature(self) -> None:
        net = build_mnist_cnn(num_classes=None, pretrained=False, in_chans=1)
        assert sum(parameter.numel() for parameter in net.parameters()) == 166_406
        assert [type(module) for module in net.children()] == [
            nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
        x = torch.rand(2, 1, 28, 28)
        weights = dict(net.named_parameters())

        def convolved(x: Tensor, name: str) -> Tensor:
            return torch.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 2, 1).relu()

        features = convolved(convolved(x, "conv1"), "conv2")
        hidden = torch.addmm(net.fc1.bias, features.flatten(1), net.fc1.weight.T).relu()
        torch.testing.assert_close(pooled_features(net, x), hidden)
        assert same_answer(net, hidden, net(x))

    def test_options_change_its_shape(self) -> None:
        net = build_mnist_cnn(num_classes=4, pretrained=False, image_size=33, width=2,
                              drop_rate=0.5)
        x = torch.rand(2, 3, 33, 33)
        assert net.forward_features(x).shape == (2, net.num_features, 8, 8) == (2, 64, 8, 8)
        assert pooled_features(net, x).shape == (2, net.head_hidden_size) == (2, 200)
        assert net(x).shape == (2, 4)
        assert not torch.equal(net(x), net(x))
        assert torch.equal(net.eval()(x), net(x))

    def test_its_head_can_be_replaced(self) -> None:
        net = build_mnist_cnn(num_classes=4, pretrained=False)
        assert classifier_keys(net) == ("fc2.weight", "fc2.bias")
        net.reset_classifier(0)
        assert classifier_keys(net) == ()
        assert net(torch.rand(1, 3, 28, 28)).shape == (1, 100)

    def test_it_is_normalised_as_mnist(self) -> None:
        net: Any = build_mnist_cnn(num_classes=None, pretrained=False)
        assert net.preprocessing == Preprocessing((0.1307,) * 3, (0.3081,) * 3, (28, 28))

    def test_there_are_no_weights(self) -> None:
        with pytest.raises(WeightsError, match="zoo/mnist_cnn has no published weights; pass pre"):
            build_mnist_cnn(num_classes=None, pretrained=True)

    @pytest.mark.parametrize("arguments", [{"image_size": 4}, {"width": 0}])
    def test_shapes_that_cannot_be_are_refused(self, arguments: dict[str, int]) -> None:
        with pytest.raises(OptionError, match="expected 8 pixels or more and width 1 or more"):
            build_mnist_cnn(num_classes=None, pretrained=False, **arguments)
