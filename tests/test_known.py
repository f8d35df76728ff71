"""The plugins that are known to exist: what a look-up says of them when they are not installed."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import zoo
from zoo import discovery
from zoo.cli import main
from zoo.errors import UnknownName
from zoo.known import known_plugins
from zoo.names import canonical_namespace

ROOT = Path(__file__).parents[1]
Install = Callable[..., Path]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is installed beside the core."""
    discovery.reset()
    with monkeypatch.context() as path:
        path.setattr(sys, "path", [])
        assert set(discovery.discovery().found) == set(discovery.CORE)
    yield
    discovery.reset()


def test_our_own_plugins_are_known_and_reserved() -> None:
    for file in ROOT.glob("plugins/*/pyproject.toml"):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        for namespace in project["entry-points"]["zoo.plugins"]:
            known = known_plugins()[namespace]
            assert (known.distribution, known.reserved) == (project["name"], True)
            assert discovery.RESERVED[namespace] == project["name"]
    assert discovery.RESERVED["zoo"] == discovery.RESERVED["timm"] == "fusion-zoo"


def test_the_table_is_in_order_and_says_what_each_is() -> None:
    assert list(known_plugins()) == sorted(known_plugins())
    for namespace, plugin in known_plugins().items():
        assert canonical_namespace(namespace) == namespace
        assert re.fullmatch(r"[a-z0-9-]+", plugin.distribution)
        assert plugin.summary
    with pytest.raises(TypeError):
        known_plugins()["acme"] = None  # type: ignore[index]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(("given", "message"), [
    ("keras/vgg16",
     "no backbone, fusion, transfer or dataset is called 'keras/vgg16'; the namespace 'keras' is "
     "fusion-zoo-keras's, which is not installed: pip install fusion-zoo-keras"),
    ("kears/vgg16",
     "did you mean 'keras/vgg16'? No installed plugin owns the namespace 'kears'; the namespace "
     "'keras' is fusion-zoo-keras's, which is not installed: pip install fusion-zoo-keras; for a "
     "Hub repository write 'hf-hub:kears/vgg16'"),
    ("tim/resnet18",
     "did you mean 'timm/resnet18'? No installed plugin owns the namespace 'tim'; for a Hub"),
])
def test_a_known_plugin_that_is_missing_answers_with_the_install_line(
    given: str, message: str
) -> None:
    with pytest.raises(UnknownName) as caught:
        zoo.info(given)
    assert message in str(caught.value)


def test_a_known_plugin_that_is_installed_is_only_near(install: Install) -> None:
    install("keras", "import zoo\n@zoo.hookimpl\ndef zoo_fusions(): return []")
    with pytest.raises(UnknownName) as caught:
        zoo.info("kears/vgg16")
    assert "did you mean 'keras/vgg16'?" in str(caught.value)
    assert "pip install" not in str(caught.value)


@pytest.mark.usefixtures("bare")
def test_zoo_plugins_names_what_could_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plugins"])
    lines = capsys.readouterr().out.splitlines()
    assert ("not installed: torchvision, torchvision's classifiers with all their weights "
            "(pip install fusion-zoo-torchvision)") in lines
    with pytest.raises(SystemExit):
        main(["plugins", "--json"])
    assert "torchvision" not in capsys.readouterr().out
