"""Configs that ask for more than a network: memory, other loaders, code, other repositories."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.errors import FormatError, ZooError

HUGE = """
import json, sys, time
import zoo

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

def load(config):
    (folder / "config.json").write_text(json.dumps(config))
    try:
        zoo.load(folder, device="cpu")
        return "loaded"
    except zoo.ZooError as error:
        return str(error)

from pathlib import Path
folder = Path(sys.argv[1])
configs = json.loads(sys.stdin.read())
load(configs.pop("honest"))
told = {}
for name, config in configs.items():
    before = peak()
    told[name] = [load(config), peak() - before]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("configs")
    net = zoo.backbone("test_resnet", num_classes=3, seed=0, device="cpu", image_size=32)
    grey = zoo.backbone("mnist_cnn", num_classes=3, seed=0, device="cpu")
    return {"plain": zoo.save(net, folder / "plain"),
            "fused": zoo.save(zoo.fuse([net, grey], "gated"), folder / "fused")}


@pytest.fixture
def plain(models: dict[str, Path], tmp_path: Path) -> Path:
    """A plain timm folder of one's own."""
    folder = shutil.copytree(models["plain"], tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    del config["zoo"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(folder: Path, change: Callable[[Any], object]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_sizes_are_refused_before_memory_is_taken(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())

    def network(architecture: str, **arguments: int) -> dict[str, Any]:
        changed = copy.deepcopy(config) | {"architecture": architecture, "model_args": arguments}
        return changed | ({"num_classes": arguments.pop("num_classes")}
                          if "num_classes" in arguments else {})

    configs = {
        "honest": config,
        # Masks of shifted windows: 26 GB, and 412 GB of relative positions.
        "windows": network("swin_tiny_patch4_window7_224", window_size=64, img_size=4096),
        "positions": network("beit_base_patch16_224", img_size=4096),
        "attention": network("levit_128", img_size=4096),
        "classes": network("test_resnet", num_classes=200_000),
        "channels": network("test_resnet", in_chans=4096),
        "patches": network("vit_huge_patch14_224", img_size=4096),
        "too many classes": network("test_resnet", num_classes=10**9),
        "too large": network("test_vit", img_size=10**6),
        "no number": {**config, "num_classes": [3] * 100_000},
    }
    done = subprocess.run([sys.executable, "-c", HUGE, plain], text=True,
                          input=json.dumps(configs), capture_output=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert {name: text for name, (text, _) in told.items() if text == "loaded"} == {}
    assert {name: grown for name, (_, grown) in told.items() if grown > 60} == {}  # MB
    for name in ("windows", "positions", "attention"):
        assert "asks for a size whose tables take" in told[name][0]


@pytest.mark.parametrize("change", [
    lambda model: model["fusion"]["options"].update(hidden=10**12),
    lambda model: model["members"][0].update(dim=10**12),
    lambda model: model.update(members=model["members"] * 5000),
    lambda model: model["members"][1]["build"].update(image_size=10**6),
    lambda model: model["members"][1]["build"].update(in_chans=10**9),
    lambda model: model["members"][1]["preprocessing"].update(size=[10**9, 10**9]),
    lambda model: model.update(classes=["a"] * 10),
    lambda model: model.update(classes={"a": 1}),
])
def test_ours_with_huge_numbers(
    models: dict[str, Path], change: Callable[[Any], None], tmp_path: Path
) -> None:
    folder = shutil.copytree(models["fused"], tmp_path / "fused")
    changed(folder, lambda config: change(config["zoo"]["model"]))
    with pytest.raises(FormatError):
        zoo.load(folder, device="cpu")


@pytest.mark.parametrize("argument", [
    "block", "block_args", "norm_layer", "embed_layer", "pretrained_cfg_overlay", "cache_dir",
    "checkpoint_path", "scriptable", "features_only", "kwargs_filter", "depth", "embed_dim"])
def test_arguments_of_the_constructor_are_listed(plain: Path, argument: str) -> None:
    changed(plain, lambda config: config["model_args"].update({argument: 1}))
    with pytest.raises(FormatError, match=f"sets {argument} of the constructor; of model_args"):
        zoo.load(plain, device="cpu")


def test_a_config_does_not_choose_the_loader(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that make timm or others read another file, or run code, do nothing."""
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", never)
    evil = {"hf_hub_id": "evil/net", "hf_hub_filename": "evil.bin", "custom_load": True,
            "url": "https://evil.example/x.pth", "file": "/etc/passwd", "source": "url",
            "state_dict": {"x": 1}}
    changed(plain, lambda config: (config["pretrained_cfg"].update(evil), config.update({
        "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True,
        "custom_pipelines": {"x": "evil"}, "quantization_config": {"x": 1}, **evil})))
    (plain / "evil.bin").write_bytes(b"a pickle")
    model = zoo.load(plain, device="cpu")
    saved = (zoo.save(model, tmp_path / "again") / "config.json").read_text()
    for word in ("evil", "passwd", "custom_load", "auto_map", "trust_remote_code"):
        assert word not in saved


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"zoo": ' * 5_000, '{"zoo": 1e999}', '{"zoo": NaN}', "\0", '"zoo"', "",
    '{"zoo": {"format": true}}', '{"zoo": {"format": 1, "model": []}}', '{"architecture": []}',
    '{"architecture": "resnet18", "model_args": 3}',
    '{"architecture": "resnet18", "pretrained_cfg": [1]}',
    '{"architecture": "resnet18", "pretrained_cfg": {"input_size": "x"}}',
    '{"architecture": "resnet18", "label_names": 5}',
])
def test_what_is_no_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ZooError):
        zoo.load(tmp_path, device="cpu")
