"""Options: read without importing the builder, and checked when they are used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from zoo.errors import OptionError
from zoo.options import accepts, checked, core_arguments, options_of
from zoo.registry import load
from zoo.specs import AnySpec, FusionSpec

Install = Callable[..., Path]

PLUGIN = '''
from __future__ import annotations
import functools
from typing import TYPE_CHECKING, Literal
import zoo

if TYPE_CHECKING:
    from torch import Tensor

def mix(tensors, *, base, weight, share: float = 0.5, most: float | None = None, steps: int = 1,
        mode: Literal["a", "b"] = "a", shares: list[float] | None = None,
        pair: tuple[float, float] = (0.0, 1.0), on: bool = True, text: str = "x",
        table: dict[str, float] | None = None, odd: Tensor | None = None, free=3):
    """Mix.

    Options:
        share: how much,
            in [0, 1]
        steps: how often

    share: not this one
    """

def needs(tensors, *, share: float): ...

def none(tensors): ...

part = functools.partial(mix, steps=2)

class Base:
    """Of a class.

    Options:
        depth: how deep
    """
    def __init__(self, dims, *, depth: int = 2): ...

class Child(Base):
    """Of a child.

    Options:
        depth: how very deep
    """

def _spec(name, **more):
    kind = "features" if name[0].isupper() else "weights"
    return zoo.FusionSpec(name=name, build="zoo_opt:" + name, kind=kind)

@zoo.hookimpl
def zoo_fusions():
    return [_spec(name) for name in ("mix", "needs", "none", "part", "Base", "Child")]
'''


@pytest.fixture
def plugin(install: Install) -> None:
    install("opt", PLUGIN, editable=True)


def spec(name: str) -> AnySpec:
    return zoo.info(f"opt/{name}")


@pytest.mark.usefixtures("plugin")
def test_options_are_read_from_the_signature_and_the_docstring() -> None:
    share, most, *_ = options = options_of(spec("mix"))
    assert (share.name, share.type, share.default) == ("share", "float", "0.5")
    assert share.help == "how much, in [0, 1]"
    assert (most.type, most.default, most.help) == ("float | None", "None", "")
    assert [option.name for option in options] == [
        "share", "most", "steps", "mode", "shares", "pair", "on", "text", "table", "odd", "free"]
    assert options[-1].type == ""
    assert options_of(spec("needs"))[0].default == ""
    assert options_of(spec("none")) == ()


@pytest.mark.usefixtures("plugin")
def test_a_class_an_inherited_initialiser_and_a_partial() -> None:
    assert [(option.name, option.help) for option in options_of(spec("Base"))] == [
        ("depth", "how deep")]
    assert [(option.name, option.help, option.default) for option in options_of(spec("Child"))] == [
        ("depth", "how very deep", "2")]
    assert {option.name: option.default for option in options_of(spec("part"))}["steps"] == "2"
    assert checked(spec("Child"), {"depth": 3}) == {"depth": 3}


def test_a_re_exported_builder(install: Install) -> None:
    install("opt", PLUGIN, editable=True)
    install("again", """
import zoo
from zoo_opt import mix, Base

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name=name, build="zoo_again:" + name, kind="features")
            for name in ("mix", "Base")]
""", editable=True)
    assert options_of(zoo.info("again/mix"))[0] == options_of(zoo.info("opt/mix"))[0]
    assert options_of(zoo.info("again/Base")) == options_of(zoo.info("opt/Base"))


def test_an_editable_plugin_is_read_as_it_is_now(install: Install) -> None:
    file = install("opt", PLUGIN, editable=True)
    assert options_of(zoo.info("opt/needs"))[0].name == "share"
    file.write_text(PLUGIN.replace("def needs(tensors, *, share:", "def needs(tensors, *, part:"))
    assert options_of(zoo.info("opt/needs"))[0].name == "part"


def test_options_of_the_core_are_the_builders_own_and_described() -> None:
    for name in [*zoo.list_fusions("zoo/*"), *zoo.list_transfers("zoo/*")]:
        found = zoo.info(name)
        options = options_of(found)
        assert [option.name for option in options] == list(checked(found, {}))
        assert all(option.help and option.type for option in options), name


def test_options_are_shown_without_torch() -> None:
    code = ("import sys, zoo; from zoo.options import options_of\n"
            "for name in [*zoo.list_fusions('zoo/*'), *zoo.list_transfers('zoo/*'), "
            "'timm/resnet18', 'mnist_cnn']: options_of(zoo.info(name))\n"
            "print([m for m in ('torch', 'timm') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(("given", "expected"), [
    ({"share": 1}, 1.0),
    ({"share": np.float64(0.25)}, 0.25),
    ({"most": None}, None),
    ({"most": 2}, 2.0),
    ({"mode": "b"}, "b"),
    ({"shares": [0.5, 1]}, [0.5, 1.0]),
    ({"shares": (0.5, 1)}, [0.5, 1.0]),
    ({"pair": [0.5, 1]}, (0.5, 1.0)),
    ({"table": {"*": 1}}, {"*": 1.0}),
    ({"on": False}, False),
    ({"odd": [1]}, [1]),
    ({"free": "anything"}, "anything"),
])
def test_a_right_value_comes_back_as_the_builder_wants_it(
    given: dict[str, Any], expected: object
) -> None:
    name = next(iter(given))
    value = checked(spec("mix"), given)[name]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(("given", "message"), [
    ({"share": "0.5"}, "the option 'share' is '0.5': input should be a valid number"),
    ({"share": True}, "the option 'share' is True: input should be a valid number"),
    ({"share": None}, "input should be a valid number"),
    ({"share": float("nan")}, "the option 'share' is nan, expected a JSON value: a finite number"),
    ({"most": float("inf")}, "the option 'most' is inf, expected a JSON value"),
    ({"shares": [0.5, float("nan")]}, "expected a JSON value"),
    ({"shares": [0.5, "a"]}, "input should be a valid number at [1]"),
    ({"shares": 0.5}, "input should be a valid array"),
    ({"steps": 1.5}, "input should be a valid integer"),
    ({"steps": True}, "input should be a valid integer"),
    ({"mode": "c"}, "the option 'mode' is 'c': input should be 'a' or 'b'"),
    ({"on": 1}, "input should be a valid boolean"),
    ({"text": 1}, "input should be a valid string"),
    ({"text": Path("x")}, "expected a JSON value"),
    ({"sharee": 1}, "no option is called 'sharee'; did you mean 'share'?; its options are share, "),
    ({"base": 1}, "no option is called 'base'"),
])
def test_a_wrong_value_is_refused_with_what_was_expected(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError) as caught:
        checked(spec("mix"), given)
    assert str(caught.value).startswith("opt/mix: ")
    assert message in str(caught.value)
    assert "share" in caught.value.allowed or not caught.value.allowed


@pytest.mark.usefixtures("plugin")
def test_required_options_and_strategies_without_any() -> None:
    with pytest.raises(OptionError, match="the option 'share' must be given"):
        checked(spec("needs"), {})
    with pytest.raises(OptionError, match="no option is called 'share'; it has none"):
        checked(spec("none"), {"share": 1})


def test_what_belongs_to_the_core_is_no_option() -> None:
    always = {"base", "data", "device", "dtype", "seed", "out", "weight"}
    for name, more in (("ties", {"key", "measured", "depth"}), ("concat", set()),
                       ("finetune", {"teachers", "criterion"}), ("mnist_cnn", {"in_chans"}),
                       ("digits", {"split"})):
        assert always | more <= core_arguments(zoo.info(name))
    # A word of the weights is free elsewhere.
    assert "depth" not in core_arguments(zoo.info("concat")) | core_arguments(zoo.info("mnist_cnn"))


def test_a_builder_may_take_fewer_keywords_than_the_core_gives() -> None:
    ties = load(zoo.info("ties"))
    assert accepts(ties, "measured")
    assert not accepts(ties, "offset")


def test_a_spec_that_is_not_registered_can_be_asked_too() -> None:
    alone = FusionSpec(name="alone", build="zoo.fusion.weights.ties:ties", kind="weights")
    assert options_of(alone) == options_of(zoo.info("ties"))
