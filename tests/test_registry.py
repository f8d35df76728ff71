"""Names to specs: look-ups, listings, suggestions, aliases, what is kept between processes."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import zoo
from zoo import discovery
from zoo.cache import cache_folder
from zoo.errors import PluginError, UnknownName
from zoo.registry import find, listing, load, resolve
from zoo.specs import BackboneSpec, FusionSpec, TransferSpec

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_names_of_other_tests(own_cache: Path) -> None:
    shutil.rmtree(own_cache / "names", ignore_errors=True)


PLUGIN = """
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="mix", build="zoo_acme:mix", kind="weights", aliases=["blend"])]

def mix():
    pass
"""

CATALOG = """
import zoo

class Catalog:
    def find(self, name):
        {find}

    def search(self, pattern):
        {search}

@zoo.hookimpl
def zoo_catalog():
    return Catalog()

@zoo.hookimpl
def zoo_transfers():
    return [zoo.TransferSpec(name="slow", build="zoo_acme:slow")]
"""


def test_a_bare_name_is_the_cores(install: Install) -> None:
    install("acme", PLUGIN.replace('"mix"', '"ties"'))
    assert zoo.info("ties").name == "zoo/ties"
    assert zoo.info("acme/ties").name == "acme/ties"
    assert zoo.info("resnet18").name.startswith("timm/resnet18.")


def test_listings_are_fresh_and_in_natural_order() -> None:
    names = zoo.list_backbones("timm/resnet*")
    assert names.index("timm/resnet18") < names.index("timm/resnet101")
    names.clear()
    assert zoo.list_backbones("timm/resnet*")


def test_a_pattern_without_a_slash_looks_in_every_namespace(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_PLUGINS", "acme")
    install("acme", PLUGIN, editable=True)
    assert zoo.list_fusions("mi*") == ["acme/mix"]
    assert zoo.list_fusions("a*/*") == ["acme/mix"]
    assert zoo.list_fusions("nobody/*") == []
    assert zoo.list_backbones("mnist_cnn") == ["zoo/mnist_cnn"]


def test_an_architecture_lists_its_tags() -> None:
    assert "timm/resnet18.a1_in1k" in zoo.list_backbones("timm/resnet18")


def test_listings_by_type_and_kind() -> None:
    assert set(zoo.list_fusions("zoo/*", kind="outputs")) == {
        "zoo/gate", "zoo/geometric", "zoo/greedy_selection", "zoo/max", "zoo/mean", "zoo/stacking",
        "zoo/vote", "zoo/weighted"}
    assert "zoo/finetune" in zoo.list_transfers()
    assert "zoo/digits" in zoo.list_datasets()
    with pytest.raises(UnknownName, match="no kind of fusion is called 'wieghts'; did you mean"):
        zoo.list_fusions(kind="wieghts")


@pytest.mark.parametrize(("given", "kind", "message"), [
    ("tise", FusionSpec, "no fusion is called 'tise'; did you mean 'ties'"),
    ("zoo/tise", FusionSpec, "did you mean 'zoo/ties'"),
    ("timm/resnt18", BackboneSpec, "did you mean 'timm/resnet18'"),
    ("resnt18", BackboneSpec, "did you mean 'resnet18'"),
    ("finetune", FusionSpec, "no fusion is called 'finetune'; zoo/finetune is a transfer"),
    ("org/name", BackboneSpec,
     "no installed plugin owns the namespace 'org'; for a Hub repository write 'hf-hub:org/name', "
     "for a path './org/name'"),
    ("Org/Name", BackboneSpec, "for a Hub repository write 'hf-hub:Org/Name'"),
    ("timmm/resnet18", BackboneSpec,
     "did you mean 'timm/resnet18'? No installed plugin owns the namespace 'timmm'; for a Hub"),
    ("timm/xyzxyzxyz", BackboneSpec, "see `zoo ls 'timm/*'`; for a Hub repository write"),
    ("xyzxyzxyz", BackboneSpec, "see `zoo ls`, or write './xyzxyzxyz' for a path"),
    ("./ties", FusionSpec, "a path or an address is no registered name"),
    ("hf-hub:org/name", FusionSpec, "a path or an address is no registered name"),
    ("a/b/c", BackboneSpec, "a name has one slash; write './a/b/c' for a path"),
])
def test_an_unknown_name_says_what_to_write(
    given: str, kind: type[FusionSpec], message: str
) -> None:
    with pytest.raises(UnknownName) as caught:
        find(given, kind)
    assert message in str(caught.value)
    assert caught.value.given == given


def test_only_networks_lie_on_the_hub() -> None:
    with pytest.raises(UnknownName) as caught:
        find("org/strategy", FusionSpec)
    assert "hf-hub" not in str(caught.value)


def test_an_unknown_name_of_any_kind() -> None:
    with pytest.raises(UnknownName, match="no backbone, fusion, transfer or dataset is called"):
        zoo.info("tise")


def test_an_alias_warns_at_the_users_line(install: Install) -> None:
    install("acme", PLUGIN)
    now = "acme/blend is now called acme/mix"
    with pytest.warns(DeprecationWarning, match=now) as seen:
        zoo.info("acme/blend")
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=now) as seen:
        find("acme/blend", FusionSpec)
    assert seen[0].filename == __file__


def test_a_deprecated_name_of_timm_warns_too() -> None:
    with pytest.warns(DeprecationWarning, match="timm/tv_resnet50 is now called timm/resnet50.tv"):
        assert zoo.info("timm/tv_resnet50").name == "timm/resnet50.tv_in1k"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.info("timm/resnet50.tv_in1k")


def test_load_imports_what_build_names(install: Install) -> None:
    install("acme", PLUGIN)
    assert load(zoo.info("acme/mix")) is sys.modules["zoo_acme"].mix


@pytest.mark.parametrize(("target", "reason"), [
    ("zoo_acme:gone", "acme/mix is built by 'zoo_acme:gone': AttributeError: "),
    ("no_such_module:mix", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("zoo_broken:mix", "ValueError: boom"),
])
def test_a_builder_that_cannot_be_imported_is_the_plugins_fault(
    install: Install, monkeypatch: pytest.MonkeyPatch, target: str, reason: str
) -> None:
    install("broken", "raise ValueError('boom')")
    install("acme", PLUGIN)
    with pytest.raises(PluginError) as caught:
        resolve(target, "acme/mix")
    assert reason in str(caught.value)
    assert "(from fusion-zoo-acme 1.0)" in str(caught.value)
    monkeypatch.setenv("ZOO_STRICT", "1")
    with pytest.raises((AttributeError, ImportError, ValueError)) as strict:
        resolve(target, "acme/mix")
    assert not isinstance(strict.value, PluginError)


def test_a_third_partys_catalogue(install: Install) -> None:
    install("acme", CATALOG.format(
        find="return zoo.BackboneSpec(name=name, build='zoo_acme:net') if name == 'b1' else None",
        search="return ['b1', 'b10', 'b2']"), editable=True)
    assert zoo.list_backbones("acme/*") == ["acme/b1", "acme/b2", "acme/b10"]
    assert zoo.list_transfers("acme/*") == ["acme/slow"]
    assert find("acme/b1", BackboneSpec).name == "acme/b1"
    assert find("acme/slow", TransferSpec).name == "acme/slow"


@pytest.mark.parametrize(("code", "reason"), [
    ("raise KeyError(name)", "its catalogue cannot find 'b1': KeyError: 'b1'"),
    ("return 3", "its catalogue cannot find 'b1': TypeError: it gave int, expected a spec"),
])
def test_a_broken_catalogue_breaks_alone(install: Install, code: str, reason: str) -> None:
    install("acme", CATALOG.format(find=code, search="raise OSError('no index')"),
            editable=True)
    with pytest.raises(PluginError) as caught:
        zoo.info("acme/b1")
    assert reason in str(caught.value)
    assert zoo.list_backbones("acme/*") == []
    assert "zoo/mnist_cnn" in zoo.list_backbones("zoo/*")


@pytest.mark.parametrize("text", ["not json", "[]", '{"key": 3}', "{}"])
def test_a_damaged_cache_is_read_again_from_the_plugin(install: Install, text: str) -> None:
    install("acme", PLUGIN, version="7.0")
    zoo.list_fusions("acme/*")
    file = cache_folder() / "names" / "acme.json"
    key = json.loads(file.read_text())["key"]
    for damaged in (text, json.dumps({"key": key, "rows": [["one"]]}), json.dumps({"key": key})):
        file.write_text(damaged)
        discovery.reset()
        assert zoo.list_fusions("acme/*") == ["acme/mix"]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file"))
    install("acme", PLUGIN, version="8.0")
    assert zoo.list_fusions("acme/*") == ["acme/mix"]


def test_a_row_says_what_it_is() -> None:
    row = next(row for row in listing("zoo/self_distill"))
    assert (row.name, row.type, row.kind) == ("zoo/self_distill", "transfer", "distillation")
    assert row.summary == zoo.info("self_distill").summary
