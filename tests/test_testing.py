"""The conformance kit: the core passes it, and a plugin with faults is told each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from zoo.cli import main
from zoo.errors import OptionError, UnknownName
from zoo.testing import Check, checks, parametrize_with_checks, run_checks

Install = Callable[..., Path]

GOOD = '''
import zoo

@zoo.hookimpl
def zoo_fusions():
    return [zoo.FusionSpec(name="first", build="zoo_acme:first", kind="weights", summary="first",
                           idempotent=True)]

def first(tensors, *, key):
    return tensors[0].clone()
'''


@parametrize_with_checks("zoo")
def test_the_core_keeps_its_own_rules(check: Check) -> None:
    check()


def test_an_expected_failure_needs_a_check_and_must_fail(install: Install) -> None:
    install("acme", GOOD.replace("tensors[0].clone()", "tensors[0] * 2"))
    outcomes = list(run_checks("acme", {"copies_of_a_model_give_it_back": "it doubles"}))
    assert [o.reason for o in outcomes if o.state == "expected"] == ["it doubles"]
    with pytest.raises(OptionError, match="did you mean 'is_described'"):
        parametrize_with_checks("acme", {"is_describd": "typo"})
    outcomes = list(run_checks("acme", {"acme/first-is_described": "it was once true"}))
    assert [(o.state, o.reason) for o in outcomes if o.check.name == "is_described"] == [
        ("failed", "it passes; take it out of expected_failures")]


def test_an_exception_of_the_plugins_own_says_where_it_was_raised(install: Install) -> None:
    file = install("acme", GOOD.replace("return tensors[0].clone()", "return {}[key]"))
    reasons = {o.check.name: o.reason for o in run_checks("acme") if o.state == "failed"}
    assert reasons["same_seed_gives_same_bytes"] == f"KeyError: 'scale' (at {file}:10)"


def test_of_a_catalogue_only_what_is_named_is_checked() -> None:
    assert {check.subject for check in checks("timm")} == {"timm"}
    with pytest.raises(UnknownName, match="timm/resnet999"):
        checks("timm", ["resnet999"])


def test_zoo_check_says_what_to_change(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("acme", GOOD.replace('summary="first"', 'summary=""'))
    with pytest.raises(SystemExit) as end:
        main(["check", "acme"])
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "acme/first: is_described: acme/first has no summary: say in one line" in printed
    assert "1 failed" in printed
