"""What a plugin cannot do to others: the ways in which it breaks, and two hundred that do not."""

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
from zoo.cli import main
from zoo.errors import PluginError
from zoo.registry import listing

Install = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

GOOD = """
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="mix", build="zoo_acme:mix", kind="weights", summary="mixes")]
"""
LOUD = """
import warnings
print("loaded!")
warnings.warn("an old friend", DeprecationWarning)
""" + GOOD


@pytest.fixture(autouse=True)
def no_names_of_other_tests(own_cache: Path) -> None:
    shutil.rmtree(own_cache / "names", ignore_errors=True)


def reason() -> str:
    """Why the namespace acme cannot be loaded, while everything else can."""
    with pytest.raises(PluginError) as caught:
        zoo.info("acme/mix")
    assert "zoo/ties" in zoo.list_fusions()
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_a_hook_of_a_newer_version_is_no_typo(install: Install) -> None:
    install("acme", GOOD + """
@zoo.hookimpl
def zoo_measures():
    return []
""")
    assert reason() == (
        f"fusion-zoo {zoo.__version__} has no hook 'zoo_measures', it has zoo_backbones, "
        "zoo_fusions, zoo_transfers, zoo_datasets, zoo_catalog; if a newer version has it: pip "
        "install -U fusion-zoo; its author can mark it @zoo.hookimpl(optionalhook=True), and older "
        "versions leave it alone")


def test_an_argument_of_a_newer_version_is_named(install: Install) -> None:
    file = install("acme", GOOD.replace("zoo_fusions()", "zoo_fusions(config)"))
    assert reason() == (
        f"zoo_fusions() takes 'config', which fusion-zoo {zoo.__version__} does not give; take it "
        "out, or, if a newer version gives it: pip install -U fusion-zoo")
    file.write_text(GOOD.replace("zoo_fusions()", "zoo_fusions(config=None, *more, **others)"))
    del sys.modules["zoo_acme"]
    discovery.reset()
    assert zoo.info("acme/mix").name == "acme/mix"


def test_a_generator_may_fail_half_way(install: Install) -> None:
    install("acme", """
import zoo

@zoo.hookimpl
def zoo_fusions():
    yield zoo.FusionSpec(name="mix", build="zoo_acme:mix", kind="weights")
    raise KeyError("second")
""")
    assert reason() == "KeyError: 'second'"
    assert zoo.list_fusions("acme/*") == []


def test_an_exception_without_words_is_named_by_its_class(install: Install) -> None:
    install("acme", """
class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no words")

raise Mute
""")
    assert reason() == "Mute"


def test_an_interruption_goes_on_and_the_next_look_up_tries_again(install: Install) -> None:
    file = install("acme", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        zoo.info("acme/mix")
    file.write_text(GOOD)
    assert zoo.info("acme/mix").name == "acme/mix"


@pytest.mark.filterwarnings("default")
def test_what_a_plugin_prints_stays_out_of_a_programs_json(
    install: Install, capsys: Capture
) -> None:
    install("acme", LOUD)
    with pytest.raises(SystemExit):
        main(["ls", "acme/*", "--json"])
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)] == ["acme/mix"]
    assert "loaded!" in err


def test_warnings_as_errors_cost_a_plugin_its_own_names_only(install: Install) -> None:
    install("acme", LOUD)
    assert reason() == "DeprecationWarning: an old friend"
    discovery.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert zoo.info("acme/mix").name == "acme/mix"


def test_a_catalogue_that_cannot_search_says_so_to_who_asks_for_it(
    install: Install, capsys: Capture
) -> None:
    install("acme", """
import zoo

class Catalog:
    def find(self, name):
        return zoo.BackboneSpec(name=name, build="zoo_acme:net") if name == "net" else None

    def search(self, pattern):
        yield "net"
        raise OSError("the index is gone")

@zoo.hookimpl
def zoo_catalog():
    return Catalog()
""")
    told = "its catalogue cannot search for '*': OSError: the index is gone"
    for command, code, said in ((["ls", "acme/*"], 1, told), (["ls", "zoo/t*"], 0, "")):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == code
        assert said in capsys.readouterr().err
    assert zoo.info("acme/net").name == "acme/net"


@pytest.mark.parametrize(("file", "content", "said"), [
    ("METADATA", b"\xff\xfe", "its metadata cannot be read: UnicodeDecodeError"),
    ("direct_url.json", b"\xff\xfe", None),
    ("entry_points.txt", b"[zoo.plugins]\nacme = \xff", None),
    ("entry_points.txt", b"[zoo.plugins]\nacme = ", "AttributeError"),
    ("entry_points.txt", b"[zoo.plugins]\nacme = zoo acme!", "AttributeError"),
])
def test_damaged_metadata_breaks_alone(
    install: Install, file: str, content: bytes, said: str | None
) -> None:
    info = install("acme", GOOD).parent / "fusion_zoo_acme-1.0.dist-info"
    (info / file).write_bytes(content)
    install("fine", GOOD.replace("zoo_acme", "zoo_fine"))
    assert zoo.list_fusions("fine/*") == ["fine/mix"]
    errors = [plugin.error or "" for plugin in zoo.plugins() if plugin.namespace == "acme"]
    assert (said is None and not any(errors)) or said in errors[0]


def test_two_hundred_plugins(install: Install) -> None:
    """A look-up imports one of them, a first listing each, and a second one none."""
    names = [f"p{number:03}" for number in range(200)]
    for name in names:
        install(name, GOOD.replace("zoo_acme", f"zoo_{name}"))

    def imported() -> set[str]:
        return {name for name in names if f"zoo_{name}" in sys.modules}

    assert zoo.info("p007/mix").build == "zoo_p007:mix"
    assert imported() == {"p007"}
    everything = listing()
    assert {f"{name}/mix" for name in names} <= {row.name for row in everything}
    assert imported() == set(names)
    for name in names:
        del sys.modules[f"zoo_{name}"]
    discovery.reset()
    assert listing() == everything
    assert imported() == set()
