"""Saved models that need plugins: what is required of the loader, and what it says without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from zoo import discovery
from zoo.cli import main
from zoo.errors import FormatError, MissingPlugin, OptionError, PluginError
from zoo.model import Model

PLUGIN = """
import timm
import zoo
from torch import nn

@zoo.hookimpl
def zoo_backbones():
    return [zoo.BackboneSpec(name="net", build="zoo_acme:build", license="MIT",
                             loads_since="1.2")]

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="middle", build="zoo_acme:middle", kind="weights")]

class Net(nn.Module):
    num_features = 6

    def __init__(self, num_classes, in_chans, tied):
        super().__init__()
        self.one = nn.Conv2d(in_chans, 6, 3)
        self.two = nn.Linear(6, 6, bias=False)
        self.three = nn.Linear(6, 6, bias=False)
        if tied:
            self.three.weight = self.two.weight
        self.reset_classifier(num_classes)

    def forward_features(self, x):
        return self.one(x)

    def forward_head(self, x, pre_logits=False):
        x = self.three(self.two(x.mean((2, 3))).relu())
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.Linear(6, num_classes) if num_classes else nn.Identity()

def build(*, num_classes, pretrained, in_chans=3, tied: bool = True):
    net = Net(num_classes, in_chans, tied)
    net.preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": [16, 16]}
    return net

def middle(tensors, *, base, key, weight):
    return sum(tensors) / len(tensors)
"""


def build(name: str = "test_vit", **arguments: Any) -> Model:
    given = {"num_classes": 4, "seed": 0, "device": "cpu",
             "image_size": 32 if name.startswith("test_") else None, **arguments}
    return zoo.backbone(name, **given)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 36, 33, generator=torch.Generator().manual_seed(1))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model(images())  # type: ignore[no-any-return]


def reloaded(model: Model, folder: Path) -> Model:
    return zoo.load(zoo.save(model, folder), device="cpu")


def edited(folder: Path, change: Callable[[Any], Any]) -> Path:
    """The folder with another config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(change(config) or config))
    return folder


@pytest.fixture
def folder(install: Callable[..., Path], tmp_path: Path) -> Path:
    install("acme", PLUGIN, version="1.3")
    fused = zoo.fuse([build("acme/net"), build()], "concat")
    folder = zoo.save(fused, tmp_path / "m")
    assert torch.equal(logits(zoo.load(folder, device="cpu")), logits(fused))
    return folder


def uninstall(tmp_path: Path) -> None:
    for info in (tmp_path / "site").glob("*.dist-info"):
        info.rename(tmp_path / info.name)
    discovery.reset()


def test_a_missing_plugin_is_named_with_what_the_file_claims(
    folder: Path, tmp_path: Path
) -> None:
    uninstall(tmp_path)
    with pytest.raises(MissingPlugin) as caught:
        zoo.load(folder)
    error = caught.value
    assert (error.namespace, error.requirement) == ("acme", "fusion-zoo-acme>=1.2")
    assert error.install == "pip install 'fusion-zoo-acme>=1.2'"
    assert str(error) == (
        f"{folder / 'config.json'} says it needs fusion-zoo-acme>=1.2 for the namespace 'acme',"
        f" and it is not installed. If you trust that, run: {error.install}")


@pytest.mark.parametrize(("requirement", "found"), [
    ("fusion-zoo-acme>=2", "fusion-zoo-acme 1.3"), ("acme-other>=1", "fusion-zoo-acme 1.3")])
def test_another_version_or_distribution_is_not_it(
    folder: Path, requirement: str, found: str
) -> None:
    def change(config: Any) -> None:
        config["zoo"]["requires"][0]["requirement"] = requirement

    with pytest.raises(MissingPlugin, match=f"{found} is installed. If you trust that"):
        zoo.load(edited(folder, change))


@pytest.mark.parametrize("requirement", [
    "fusion-zoo-acme @ https://acme.example/acme.whl", "fusion-zoo-acme[all]>=1", "acme>=", "", 3,
    'acme; extra == "\'; rm -rf ~; \'"'])
def test_only_a_distribution_and_its_version_can_be_required(
    folder: Path, requirement: object
) -> None:
    def change(config: Any) -> None:
        config["zoo"]["requires"][0]["requirement"] = requirement

    with pytest.raises(FormatError, match=r"config.json: is damaged: zoo.requires has"):
        zoo.load(edited(folder, change))


def test_a_file_cannot_pass_another_distribution_off_as_a_known_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(config: Any) -> None:
        config["zoo"]["requires"] = [{"namespace": "example", "requirement": "fusion-zoo-exampel"}]

    with pytest.raises(MissingPlugin) as caught:
        zoo.load(edited(folder, change))
    assert ("Beware: that namespace is known to be fusion-zoo-example's. If you trust that, run: "
            "pip install fusion-zoo-exampel") in str(caught.value)
    assert caught.value.known == "fusion-zoo-example"
    with pytest.raises(SystemExit):
        main(["show", str(folder)])
    assert "; beware: it is known to be fusion-zoo-example's; if you" in capsys.readouterr().out


def test_zoo_show_says_which_plugins_are_missing_or_too_old(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(["show", str(folder), *arguments])
        assert end.value.code == 0
        return capsys.readouterr().out

    assert "  requires: fusion-zoo-acme>=1.2 (namespace acme)\n" in shown()
    info = tmp_path / "site" / "fusion_zoo_acme-1.3.dist-info"
    metadata = (info / "METADATA").read_text()
    (info / "METADATA").write_text(metadata.replace("Version: 1.3", "Version: 1.1"))
    discovery.reset()
    assert ("  requires: fusion-zoo-acme>=1.2 (namespace acme); fusion-zoo-acme 1.1 is installed; "
            "if you trust this file: pip install 'fusion-zoo-acme>=1.2'\n") in shown()
    uninstall(tmp_path)
    assert "(namespace acme); not installed; if you trust this file: pip install" in shown()
    assert json.loads(shown("--json"))["zoo"]["requires"] == [
        {"namespace": "acme", "requirement": "fusion-zoo-acme>=1.2"}]


@pytest.mark.parametrize(("version", "requirement"), [
    ("1.3", "fusion-zoo-acme>=1.3"), ("1.4.dev2+gabc.d2026", "fusion-zoo-acme>=1.4.dev2"),
    ("", "fusion-zoo-acme"), ("no version", "fusion-zoo-acme")])
def test_any_version_makes_a_requirement_that_it_meets(
    install: Callable[..., Path], tmp_path: Path, version: str, requirement: str
) -> None:
    install("acme", PLUGIN.replace('loads_since="1.2"', 'loads_since=""'), version=version)
    model = build("acme/net")
    folder = zoo.save(model, tmp_path / "m")
    required = json.loads((folder / "config.json").read_text())["zoo"]["requires"]
    assert required == [{"namespace": "acme", "requirement": requirement}]
    assert torch.equal(logits(zoo.load(folder, device="cpu")), logits(model))


def test_fused_weights_need_the_backbones_plugin_and_no_fusions(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    install("acme", PLUGIN, version="1.3")
    theirs = zoo.fuse([build(seed=1), build(seed=2)], "acme/middle")
    zoo.save(theirs, tmp_path / "theirs")
    zoo.save(zoo.fuse([build("acme/net"), build("acme/net")], "average"), tmp_path / "ours")
    uninstall(tmp_path)
    assert torch.equal(logits(zoo.load(tmp_path / "theirs", device="cpu")), logits(theirs))
    with pytest.raises(MissingPlugin, match=r"fusion-zoo-acme>=1.2"):
        zoo.load(tmp_path / "ours")


def test_tied_weights_stay_tied(install: Callable[..., Path], tmp_path: Path) -> None:
    install("acme", PLUGIN, version="1.3")
    for model in (build("acme/net"), zoo.fuse([build("acme/net"), build("acme/net", seed=1)],
                                              "average"),
                  zoo.fuse([build("acme/net"), build()], "concat")):
        again = reloaded(model, tmp_path / "m")
        net: Any = next(again.each_member()).net
        assert net.two.weight is net.three.weight
        assert len(list(again.parameters())) == len(list(model.parameters()))
        assert torch.equal(logits(again), logits(model))
    untied = reloaded(build("acme/net", tied=False), tmp_path / "n")
    net = next(untied.each_member()).net
    assert net.two.weight is not net.three.weight


def test_a_plugins_timm_network_is_plain_only_as_timm_builds_it(
    install: Callable[..., Path], tmp_path: Path
) -> None:
    source = PLUGIN.partition("class Net")[0] + """
def build(*, num_classes, pretrained, in_chans=3, bent: bool = False):
    net = timm.create_model("test_resnet", num_classes=num_classes, in_chans=in_chans)
    net.preprocessing = {"size": [32, 32]}
    if bent:
        net.act1 = nn.GELU()
    return net
"""
    install("acme", source, version="1.3")
    plain, bent = build("acme/net"), build("acme/net", bent=True)
    for model, is_plain in ((plain, True), (bent, False)):
        folder = zoo.save(model, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        assert ("architecture" in config) == is_plain
        assert config["zoo"]["requires"] == ([] if is_plain else [
            {"namespace": "acme", "requirement": "fusion-zoo-acme>=1.2"}])
        assert torch.equal(logits(zoo.load(folder, device="cpu")), logits(model))


def test_what_is_no_backbone_is_the_plugins_fault(
    install: Callable[..., Path]
) -> None:
    start = PLUGIN.partition("class Net")[0]
    install("acme", start + "\ndef build(*, num_classes, pretrained): return nn.ReLU()\n")
    with pytest.raises(PluginError, match="ReLU has no forward_features, forward_head"):
        build("acme/net")
    with pytest.raises(OptionError, match="acme/net: it cannot change in_chans; leave it out"):
        build("acme/net", in_chans=1)
