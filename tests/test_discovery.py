"""Real distributions on the path: what is found, what is loaded, and what breaks alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import zoo
from zoo import discovery
from zoo.errors import PluginError, UnknownName

Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_names_of_other_tests(own_cache: Path) -> None:
    shutil.rmtree(own_cache / "names", ignore_errors=True)


GOOD = """
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="mix", build="zoo_acme:mix", kind="weights", summary="mixes")]
"""


def plugin(namespace: str) -> zoo.Plugin:
    return next(p for p in zoo.plugins() if p.namespace == namespace)


def test_a_plugin_is_found_and_its_names_are_in_its_namespace(install: Install) -> None:
    install("acme", GOOD, version="2.3")
    assert "acme/mix" in zoo.list_fusions()
    assert zoo.info("acme/mix").name == "acme/mix"
    found = plugin("acme")
    assert (found.distribution, found.version) == ("fusion-zoo-acme", "2.3")
    assert found.hooks == ("zoo_fusions",)
    assert found.error is None


def test_the_core_is_plugins_too() -> None:
    assert plugin("zoo").hooks == (
        "zoo_backbones", "zoo_datasets", "zoo_fusions", "zoo_transfers")
    assert plugin("timm").hooks == ("zoo_catalog",)


def test_a_look_up_imports_one_plugin_and_no_other(install: Install) -> None:
    install("acme", GOOD)
    install("other", GOOD.replace("zoo_acme", "zoo_other"))
    zoo.info("acme/mix")
    assert "zoo_acme" in sys.modules
    assert "zoo_other" not in sys.modules


def test_a_core_look_up_imports_no_third_party(install: Install) -> None:
    install("acme", GOOD)
    zoo.info("ties")
    zoo.info("timm/resnet18")
    assert "zoo_acme" not in sys.modules


def test_a_listing_reads_cached_names_and_imports_on_a_miss_only(install: Install) -> None:
    install("cached", GOOD.replace("zoo_acme", "zoo_cached"))
    assert "cached/mix" in zoo.list_fusions()
    del sys.modules["zoo_cached"]
    discovery.reset()
    assert "cached/mix" in zoo.list_fusions()
    assert "zoo_cached" not in sys.modules


def test_a_new_version_is_read_again(install: Install, tmp_path: Path) -> None:
    module = install("fresh", GOOD.replace("zoo_acme", "zoo_fresh"), version="1.0")
    assert zoo.list_fusions("fresh/*") == ["fresh/mix"]
    (module.parent / "fusion_zoo_fresh-1.0.dist-info").rename(tmp_path / "gone")
    del sys.modules["zoo_fresh"]
    install("fresh", GOOD.replace("zoo_acme", "zoo_fresh").replace('"mix"', '"blend"'),
            version="1.1")
    assert zoo.list_fusions("fresh/*") == ["fresh/blend"]


def test_an_editable_install_is_never_cached(install: Install) -> None:
    install("dev", GOOD.replace("zoo_acme", "zoo_dev"), editable=True)
    zoo.list_fusions("dev/*")
    del sys.modules["zoo_dev"]
    install("dev", GOOD.replace("zoo_acme", "zoo_dev").replace('"mix"', '"blend"'), editable=True)
    assert zoo.list_fusions("dev/*") == ["dev/blend"]


def test_one_distribution_seen_twice_counts_once(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", GOOD)
    second = tmp_path / "second"
    second.mkdir()
    monkeypatch.syspath_prepend(str(second))
    install("acme", GOOD, folder=second)
    assert plugin("acme").error is None


@pytest.mark.parametrize(("source", "reason"), [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("import zoo_acme_part", "No module named 'zoo_acme_part'"),
    ("def broken(:", "SyntaxError: invalid syntax"),
    (GOOD.replace("zoo_fusions", "zoo_fusion"),
     "unknown hook 'zoo_fusion'; did you mean 'zoo_fusions'?"),
    (GOOD.replace("zoo_fusions", "zoo_catalogue"),
     "unknown hook 'zoo_catalogue'; did you mean 'zoo_catalog'?"),
    (GOOD.replace("return [", "x = ["), "zoo_fusions() returned NoneType, expected an iterable"),
    (GOOD.replace("@zoo.hookimpl", ""), "zoo_fusions() is not marked with @zoo.hookimpl"),
    ("x = 1", "zoo_acme implements no hook; there are zoo_backbones"),
    (GOOD.replace("return [", "return 3 # ["), "zoo_fusions() returned int, expected an iterable"),
    (GOOD.replace("zoo.FusionSpec(", "dict("), "expected a FusionSpec"),
    (GOOD.replace('"weights"', '"wieghts"'), "kind is 'wieghts', expected 'weights' or"),
    (GOOD.replace('"zoo_acme:mix"', '"zoo_acme.mix"'), "build is 'zoo_acme.mix', expected"),
    (GOOD.replace("return [", "return 2 * ["), "the name 'mix' is given twice"),
    (GOOD.replace('name="mix"', 'name="other/mix"'), "is not in the namespace 'acme'"),
    (GOOD.replace('kind=', 'aliases=["other/old"], kind='), "is not in the namespace 'acme'"),
    (GOOD.replace('kind=', 'aliases=["mix"], kind='), "the name 'mix' is given twice"),
    (GOOD.replace("zoo_fusions", "zoo_catalog"),
     "zoo_catalog() returned list, expected an object with find(name) and search(pattern)"),
    (GOOD.replace("return", "raise ValueError('boom')\n    return"), "ValueError: boom"),
])
def test_a_broken_plugin_loses_its_own_names_only(
    install: Install, source: str, reason: str
) -> None:
    install("acme", source)
    install("fine", GOOD.replace("zoo_acme", "zoo_fine"))
    assert "fine/mix" in zoo.list_fusions()
    assert not zoo.list_fusions("acme/*")
    with pytest.raises(PluginError) as caught:
        zoo.info("acme/mix")
    assert reason in str(caught.value)
    assert "(from fusion-zoo-acme 1.0)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert reason in (plugin("acme").error or "")


def test_strict_lets_the_plugins_own_exception_through(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", "import no_such_module")
    monkeypatch.setenv("ZOO_STRICT", "1")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        zoo.info("acme/mix")


def test_two_distributions_of_one_namespace_are_both_named(install: Install) -> None:
    install("acme", GOOD)
    install("acme", GOOD, distribution="acme-fusions", version="4.0")
    with pytest.raises(PluginError, match="two distributions claim it") as caught:
        zoo.info("acme/mix")
    assert "fusion-zoo-acme 1.0" in str(caught.value)
    assert "acme-fusions 4.0" in str(caught.value)
    assert "zoo/ties" in zoo.list_fusions()


def test_a_reserved_namespace_belongs_to_its_distribution(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "RESERVED", {"acme": "fusion-zoo-acme"})
    install("acme", GOOD.replace("zoo_acme", "zoo_squatter"), distribution="squatter",
            module="zoo_squatter")
    with pytest.raises(PluginError, match="reserved for fusion-zoo-acme"):
        zoo.info("acme/mix")
    install("acme", GOOD)
    assert zoo.info("acme/mix").build == "zoo_acme:mix"
    refused = [found for found in zoo.plugins() if found.distribution == "squatter"]
    assert [found.error for found in refused] == ["the namespace is reserved for fusion-zoo-acme"]


def test_nobody_takes_the_cores_namespaces(install: Install) -> None:
    install("zoo", GOOD, distribution="squatter", module="zoo_acme")
    assert plugin("zoo").distribution == "fusion-zoo"
    assert "zoo/ties" in zoo.list_fusions("zoo/*")
    with pytest.raises(UnknownName):
        zoo.info("zoo/mix")
    refused = zoo.plugins()[-1]
    assert (refused.distribution, refused.namespace) == ("squatter", "zoo")
    assert refused.error == "the namespace is reserved for fusion-zoo"
    assert "zoo_acme" not in sys.modules


def test_zoo_plugins_allows_by_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", GOOD)
    install("other", GOOD.replace("zoo_acme", "zoo_other"))
    monkeypatch.setenv("ZOO_PLUGINS", "acme")
    discovery.reset()
    assert zoo.list_fusions("acme/*")
    with pytest.raises(PluginError, match="ZOO_PLUGINS=acme does not allow it"):
        zoo.info("other/mix")
    monkeypatch.setenv("ZOO_PLUGINS", "")
    discovery.reset()
    assert not zoo.list_fusions("acme/*")
    assert "zoo/ties" in zoo.list_fusions()


def test_underscores_and_hyphens_are_one_namespace(install: Install) -> None:
    install("my_acme", GOOD.replace("zoo_acme", "zoo_my_acme"))
    assert zoo.info("my-acme/mix").name == zoo.info("my_acme/mix").name == "my-acme/mix"


def test_a_namespace_that_is_none_is_named(install: Install) -> None:
    install("Acme", GOOD, module="zoo_acme")
    assert "is not a name" in (plugin("Acme").error or "")


def test_names_may_carry_their_namespace(install: Install) -> None:
    install("acme", GOOD.replace('name="mix"', 'name="acme/mix", aliases=["acme/blend"]'))
    assert zoo.info("acme/mix").name == "acme/mix"
    with pytest.warns(DeprecationWarning, match="acme/blend is now called acme/mix"):
        assert zoo.info("acme/blend").name == "acme/mix"


def test_a_hook_of_a_newer_version_may_be_optional(install: Install) -> None:
    install("acme", GOOD + """
@zoo.hookimpl(optionalhook=True)
def zoo_of_tomorrow():
    return []
""")
    assert plugin("acme").error is None
    assert plugin("acme").hooks == ("zoo_fusions",)


def test_a_failure_is_met_once_and_reported_every_time(install: Install) -> None:
    file = install("acme", """
with open(__file__ + ".tried", "a") as tried:
    tried.write("x")
raise ValueError("boom")
""")
    for _ in range(2):
        with pytest.raises(PluginError, match="ValueError: boom"):
            zoo.info("acme/mix")
    assert file.with_name("zoo_acme.py.tried").read_text() == "x"
    assert list(discovery.discovery().failed) == ["acme"]


def test_an_entry_point_may_name_an_object(install: Install) -> None:
    file = install("acme", GOOD + "\nclass Hooks:\n    zoo_fusions = staticmethod(zoo_fusions)\n")
    entries = file.parent / "fusion_zoo_acme-1.0.dist-info" / "entry_points.txt"
    entries.write_text("[zoo.plugins]\nacme = zoo_acme:Hooks\n")
    discovery.reset()
    assert zoo.info("acme/mix").name == "acme/mix"


@pytest.mark.parametrize(("text", "namespace", "reason"), [
    ("acme", "fusion-zoo-acme", "its entry_points.txt cannot be read: TypeError"),
    ("acme = zoo_acme\nac_me = zoo_acme\nac-me = zoo_acme", "ac-me",
     "fusion-zoo-acme 1.0 claims it 2 times"),
])
def test_a_malformed_entry_point_breaks_alone(
    install: Install, text: str, namespace: str, reason: str
) -> None:
    file = install("acme", GOOD)
    entries = file.parent / "fusion_zoo_acme-1.0.dist-info" / "entry_points.txt"
    entries.write_text(f"[zoo.plugins]\n{text}\n")
    discovery.reset()
    assert "zoo/ties" in zoo.list_fusions()
    assert reason in (plugin(namespace).error or "")


def test_three_claims_are_all_named(install: Install) -> None:
    for distribution in ("one", "two", "three"):
        install("acme", GOOD, distribution=distribution)
    error = plugin("acme").error or ""
    assert error.startswith("3 distributions claim it, ")
    assert all(f"{name} 1.0" in error for name in ("one", "two", "three"))
    assert error.endswith("; uninstall all but one")


def test_the_views_are_read_only() -> None:
    found = discovery.discovery()
    for view in (found.found, found.core, found.failed, found.load("zoo").specs):
        with pytest.raises(TypeError):
            view["acme"] = None  # type: ignore[index]
    assert isinstance(zoo.plugins(), tuple)
