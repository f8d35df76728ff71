"""The rules that every plugin keeps: what `zoo check example` runs."""

from __future__ import annotations

from zoo.testing import Check, parametrize_with_checks


@parametrize_with_checks("example")
def test_conformance(check: Check) -> None:
    check()
