"""What the namespace lists, what it says of each, and what that costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from torchvision import models

import zoo
import zoo_torchvision
from zoo.errors import UnknownName, ZooError
from zoo_torchvision.catalog import TorchvisionCatalog

CACHED = f"torchvision-{metadata.version('torchvision')}.json"


def test_every_classifier_and_every_entry_is_listed_and_nothing_else() -> None:
    expected = set()
    for architecture in models.list_models(module=models):
        expected |= {architecture} | {
            f"{architecture}.{entry.name}" for entry in models.get_model_weights(architecture)}
    assert set(TorchvisionCatalog().search("*")) == expected
    assert "resnet50.IMAGENET1K_V2" in expected
    assert not any("rcnn" in name or "quantized" in name or "r3d" in name for name in expected)


def test_a_pattern_of_architectures_means_their_entries_too() -> None:
    assert zoo.list_backbones("torchvision/resnet50") == [
        "torchvision/resnet50", "torchvision/resnet50.IMAGENET1K_V1",
        "torchvision/resnet50.IMAGENET1K_V2"]
    assert zoo.list_backbones("torchvision/vit_h*LINEAR_V1") == [
        "torchvision/vit_h_14.IMAGENET1K_SWAG_LINEAR_V1"]


def test_an_architecture_alone_is_its_default_weights() -> None:
    spec = zoo.info("torchvision/resnet50")
    assert isinstance(spec, zoo.BackboneSpec)
    assert spec.name == "torchvision/resnet50.IMAGENET1K_V2"
    assert spec == zoo.info("torchvision/resnet50.IMAGENET1K_V2")
    assert spec.weights == models.ResNet50_Weights.DEFAULT.url
    assert spec.summary == "25.6 M parameters, 80.9 % on ImageNet-1k, 224 × 224 pixels"
    assert spec.paper == "Deep Residual Learning for Image Recognition, arXiv:1512.03385"
    assert (spec.license, spec.loads_since) == ("", "0.1.0")


def test_every_spec_says_what_its_weights_say() -> None:
    catalog = TorchvisionCatalog()
    for architecture in models.list_models(module=models):
        for entry in models.get_model_weights(architecture):
            spec = catalog.find(f"{architecture}.{entry.name}")
            assert spec is not None
            assert spec.weights == entry.url
            assert spec.input_size == (3, *entry.transforms().crop_size * 2)
            assert (spec.license == "CC-BY-NC-4.0") == ("SWAG" in entry.name)
            assert ("no classifier" in spec.summary) == (entry.meta["categories"] is None)
            assert re.search(r"arXiv:\d{4}\.\d{4,5}$", spec.paper) or architecture == (
                "squeezenet1_1")  # its docstring links to a repository instead
            # What torch's check of a download goes by.
            assert re.search(r"-[0-9a-f]{8,}\.pth$", entry.url)


def test_a_wrong_name_offers_near_ones() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'torchvision/resnet50'"):
        zoo.info("torchvision/resnet51")
    assert TorchvisionCatalog().find("fasterrcnn_resnet50_fpn") is None


def test_the_answer_is_cached_until_its_format_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    (tmp_path / "torchvision.py").write_text("raise ImportError('no such library: libcudart')")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = {"format": 1, "models": {"only": {}}, "defaults": {}}
    (tmp_path / CACHED).write_text(json.dumps(known))
    assert TorchvisionCatalog().search("*") == ["only"]
    (tmp_path / CACHED).write_text(json.dumps({**known, "format": 0}))
    with pytest.raises(ZooError, match=r"torchvision cannot list its models: ImportError: no"):
        TorchvisionCatalog().find("only")


def test_describing_itself_costs_no_torch() -> None:
    code = ("import sys, zoo_torchvision; zoo_torchvision.zoo_catalog().find('resnet18'); "
            "sys.exit(bool({'torch', 'torchvision'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_distribution_owns_the_namespace() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["zoo.plugins"] == {"torchvision": zoo_torchvision.__name__}
