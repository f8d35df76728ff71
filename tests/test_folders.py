"""timm's layout of a model, both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

import zoo
from zoo.errors import FormatError
from zoo.store.timm_layout import from_config

# Where zoo cannot be imported: plain timm must do.
PLAIN = """
import sys
sys.modules["zoo"] = None
import timm, torch
torch.set_num_threads(int(sys.argv[1]))  # another number rounds sums otherwise
for folder in sys.argv[2:]:
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x, expected = torch.load(f"{folder}.pt")
    with torch.no_grad():
        assert torch.equal(net(x), expected), folder
print("equal")
"""


def images(side: int, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def test_fused_weights_are_a_plain_timm_model_without_zoo(tmp_path: Path) -> None:
    folders = []
    for name, side, channels in (("resnet18", 32, 3), ("vit_tiny_patch16_224", 64, 3),
                                 ("tf_efficientnet_lite0", 64, 3), ("test_convnext", 32, 1)):
        members = [zoo.backbone(name, num_classes=4, image_size=side, in_chans=channels, seed=seed,
                                device="cpu") for seed in (1, 2)]
        fused = zoo.fuse(members, "average", norms="pooled")
        folder = zoo.save(fused, tmp_path / name)
        member = next(fused.each_member())
        x = member.prepare(images(side, channels))
        with torch.no_grad():
            torch.save((x, fused(images(side, channels))), f"{folder}.pt")
        config = json.loads((folder / "config.json").read_text())
        assert config["zoo"]["requires"] == []
        assert config["pretrained_cfg"]["input_size"] == [channels, side, side]
        folders.append(str(folder))
    ran = subprocess.run([sys.executable, "-c", PLAIN, str(torch.get_num_threads()), *folders],
                         capture_output=True, text=True, check=False)
    assert ran.stdout == "equal\n", ran.stderr


@pytest.mark.parametrize(("name", "arguments"), [
    ("test_resnet", {}),
    ("test_resnet", {"in_chans": 1}),
    ("test_vit", {"img_size": 64, "global_pool": "avg", "class_token": False}),
])
def test_what_timm_saves_is_loaded_and_saved_again(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, **arguments).eval()
    save_for_hf(net, str(tmp_path / "timm"), safe_serialization=True,
                model_config={"label_names": ["x", "y", "z"]})
    model = zoo.load(tmp_path / "timm", device="cpu")
    side, channels = model.image_size, model.in_chans
    assert model.classes == ("x", "y", "z")
    assert (side, channels) == (arguments.get("img_size", 160), arguments.get("in_chans", 3))
    member = next(model.each_member())
    with torch.no_grad():
        expected = net(member.prepare(images(side, channels)))
        assert torch.equal(model(images(side, channels)), expected)
        again = zoo.load(zoo.save(model, tmp_path / "again"), device="cpu")
        assert torch.equal(again(images(side, channels)), expected)
        plain = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
        assert torch.equal(plain(member.prepare(images(side, channels))), expected)
        both = zoo.fuse([model, model], "mean")
        loaded = zoo.load(zoo.save(both, tmp_path / "both"), device="cpu")
        assert torch.equal(loaded(images(side, channels)), both(images(side, channels)))


def test_labels_may_be_a_mapping_from_index_to_name() -> None:
    net: Any = from_config({"architecture": "test_resnet", "num_classes": 2,
                            "label_names": {"1": "b", "0": "a"}}, Path("config.json"))
    assert net.label_names == ("a", "b")


@pytest.mark.parametrize(("changed", "message"), [
    ({"architecture": "resnet9000"}, "timm has no architecture 'resnet9000'"),
    ({"model_args": {"norm_layer": "os.system"}}, "sets norm_layer of the constructor; of "
     "model_args only act_layer, "),
    ({"num_classes": 10**9}, "num_classes is 1000000000, expected whole numbers up to 200,000"),
    ({"num_classes": "4"}, "num_classes is '4', expected whole numbers"),
    ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "input_size is .*up to 4,096"),
    ({"model_args": {"window_size": 4096}}, "window_size is 4096, expected whole numbers up to 64"),
])
def test_a_config_may_not_set_everything(changed: Mapping[str, Any], message: str) -> None:
    config = {"architecture": "test_vit", "num_classes": 4, **changed}
    with pytest.raises(FormatError, match=f"^config.json: .*{message}"):
        from_config(config, Path("config.json"))


def test_networks_that_timm_would_build_differently_are_ours(tmp_path: Path) -> None:
    for arguments in ({"activation": "relu"}, {"in_chans": 5}):
        model = zoo.backbone("test_vit", num_classes=4, device="cpu", image_size=32, **arguments)
        folder = zoo.save(model, tmp_path / "m")
        assert "architecture" not in json.loads((folder / "config.json").read_text())
        x = images(32, model.in_chans)
        with torch.no_grad():
            assert torch.equal(zoo.load(folder, device="cpu")(x), model(x))
