from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.backbones.timm_catalog import TimmCatalog
from zoo.errors import ZooError

FAKE_TIMM = '''
from types import SimpleNamespace

print("imports may print")
CONFIG = SimpleNamespace(
    tag="in1k", input_size=(3, 32, 32), num_classes=0, interpolation="bilinear", mean=(0.5,),
    std=(0.25,), license="mit", paper_name="A Network", paper_ids=("arXiv:1", "arXiv:2"),
    origin_url="https://origin", hf_hub_id=None, url="https://weights")
list_models = lambda: ["net10", "net9"]
get_pretrained_cfg = lambda name, allow_unregistered: CONFIG if name == "net10" else None
'''
FAKE_MODELS = '''
from timm import CONFIG
get_arch_pretrained_cfgs = lambda name: {f"{name}.in1k": CONFIG}
get_deprecated_models = lambda: {"old_net": "net10", "gone": None}
'''


@pytest.fixture
def fake_timm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], Path]:
    """A timm of two networks, installed before the real one; gives the file of its catalogue."""
    site = tmp_path / "timm-site"
    (site / "timm" / "models").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))

    def install(version: str, source: str = FAKE_TIMM) -> Path:
        for info in site.glob("*.dist-info/METADATA"):
            info.unlink()
            info.parent.rmdir()
        info = site / f"timm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: timm\nVersion: {version}\n")
        (site / "timm" / "__init__.py").write_text(source)
        (site / "timm" / "models" / "__init__.py").write_text(FAKE_MODELS)
        return tmp_path / "cache" / f"timm-{version}.json"

    return install


def test_an_architecture_means_its_default_tag() -> None:
    spec = TimmCatalog().find("resnet18")
    assert spec is not None
    assert spec.name == "resnet18.a1_in1k"
    assert spec.build == "zoo.backbones.timm_build:build"
    assert spec.input_size == (3, 224, 224)
    assert spec.weights == "hf-hub:timm/resnet18.a1_in1k"
    assert spec.license == "Apache-2.0"
    assert spec.paper == "arXiv:2110.00476"
    assert spec.summary == ("1,000 classes, 224 × 224 pixels, bicubic; mean 0.485 0.456 0.406; "
                            "std 0.229 0.224 0.225")


@pytest.mark.parametrize(("given", "expected"), [
    ("resnet18.tv_in1k", "resnet18.tv_in1k"),
    ("tf_efficientnet_b0_ns", "tf_efficientnet_b0.ns_jft_in1k"),
    ("tf_efficientnet_b0_ns.aa_in1k", "tf_efficientnet_b0.aa_in1k"),
    ("resnet18.nope", None),
    ("resnet18.", None),
    ("vit_base_patch32_224_sam", None),  # timm's own deprecation leads nowhere
    ("no_such_net", None),
])
def test_names_are_resolved_as_timm_does(given: str, expected: str | None) -> None:
    spec = TimmCatalog().find(given)
    assert (spec and spec.name) == expected


def test_a_renamed_network_lists_its_older_names() -> None:
    spec = TimmCatalog().find("tf_efficientnet_b0.ns_jft_in1k")
    assert spec is not None
    assert spec.aliases == ("tf_efficientnet_b0_ns",)


def test_a_network_without_weights_says_so() -> None:
    spec = TimmCatalog().find("nfnet_f0")
    assert spec is not None
    assert (spec.name, spec.weights) == ("nfnet_f0", "")


@pytest.mark.parametrize("pattern", ["resnet18*", "*_small", "resnet50.a?_in1k", "*.in1k", "none*"])
def test_search_finds_what_timm_lists(pattern: str) -> None:
    import timm

    expected = {*timm.list_models(pattern), *timm.list_models(pattern, include_tags=True)}
    assert set(TimmCatalog().search(pattern)) == expected


def test_search_is_in_natural_order() -> None:
    names = TimmCatalog().search("resnet*")
    assert [name for name in names if "." not in name][:4] == [
        "resnet10t", "resnet14t", "resnet18", "resnet18d"]
    assert names.index("resnet18.a1_in1k") == names.index("resnet18") + 1


def test_every_default_is_timms() -> None:
    import timm

    catalogue = TimmCatalog()
    for architecture in timm.list_models("*mobilenet*"):
        tag = timm.get_pretrained_cfg(architecture).tag
        spec = catalogue.find(architecture)
        assert spec is not None
        assert spec.name == (f"{architecture}.{tag}" if tag else architecture)


def test_asking_imports_neither_timm_nor_torch() -> None:
    TimmCatalog().find("resnet18")
    code = ("import sys\n"
            "from zoo.backbones.timm_catalog import TimmCatalog\n"
            "assert TimmCatalog().find('resnet18') and TimmCatalog().search('vgg*')\n"
            "sys.exit(bool({'torch', 'timm'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_timm_is_asked_once_per_version(fake_timm: Callable[..., Path]) -> None:
    first = fake_timm("9.1")
    assert TimmCatalog().search("*") == ["net9", "net10", "net10.in1k"]
    first.write_text(json.dumps({**json.loads(first.read_text()), "names": ["from_the_cache"]}))
    assert TimmCatalog().search("*") == ["from_the_cache"]
    second = fake_timm("9.2")
    assert TimmCatalog().search("*") == ["net9", "net10", "net10.in1k"]
    assert second.is_file()


def test_every_field_of_a_spec_comes_from_timm(fake_timm: Callable[..., Path]) -> None:
    fake_timm("9.1")
    spec = TimmCatalog().find("net10")
    assert spec is not None
    assert (spec.name, spec.aliases, spec.input_size) == ("net10.in1k", ("old_net",), (3, 32, 32))
    assert (spec.license, spec.paper, spec.weights) == (
        "MIT", "A Network, arXiv:1, arXiv:2", "https://weights")
    assert spec.summary == "no classifier, 32 × 32 pixels, bilinear; mean 0.5; std 0.25"
    assert TimmCatalog().find("gone") is None
    unregistered = TimmCatalog().find("net9")
    assert unregistered is not None
    assert unregistered.weights == ""


@pytest.mark.parametrize("damage", ['{"format": 2, "models": {', "", "[]", '{"format": 1}'])
def test_a_damaged_or_older_cache_is_made_again(
    fake_timm: Callable[..., Path], damage: str
) -> None:
    file = fake_timm("9.1")
    file.parent.mkdir()
    file.write_text(damage)
    assert TimmCatalog().search("net9") == ["net9"]
    assert json.loads(file.read_text())["names"] == ["net9", "net10", "net10.in1k"]


def test_a_cache_that_cannot_be_written_is_done_without(
    fake_timm: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_timm("9.1")
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "a file" / "cache"))
    catalogue = TimmCatalog()
    assert catalogue.search("net9") == ["net9"]
    fake_timm("9.1", "raise SystemExit('asked twice')")
    assert catalogue.search("net10*") == ["net10", "net10.in1k"]


def test_a_timm_that_cannot_be_imported_is_an_error(fake_timm: Callable[..., Path]) -> None:
    fake_timm("9.1", "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(ZooError, match=r"timm cannot list its models: .*torchvision::nms"):
        TimmCatalog().find("resnet18")
