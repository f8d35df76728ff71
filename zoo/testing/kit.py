"""Collect the checks of a namespace, run them, or hand them to pytest."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.discovery import discovery
from zoo.errors import OptionError, UnknownName, ZooError
from zoo.names import canonical_namespace, suggest
from zoo.specs import AnySpec, BackboneSpec, DatasetSpec, FusionSpec, TransferSpec


@dataclass(frozen=True)
class Check:
    """One check of one thing: call it; it raises AssertionError saying what the author must change.

    name: of the check function, `keeps_shapes_and_dtypes`. subject: `acme/gated`, or the namespace
    itself for checks of the plugin as a whole.
    """

    name: str
    subject: str
    function: Callable[[], None] = field(repr=False, compare=False)

    @property
    def id(self) -> str:
        return f"{self.subject}-{self.name}"

    def __call__(self) -> None:
        __tracebackhide__ = True
        self.function()


@dataclass(frozen=True)
class Outcome:
    """What one check came to: `passed`, `failed` or `expected` (a failure that was announced)."""

    check: Check
    state: str
    reason: str = ""


def checks(namespace: str, names: Sequence[str] = ()) -> list[Check]:
    """All checks of an installed plugin: of the plugin itself, then of each thing it brings.

    names: those of a catalogue to check, `["resnet18"]`; it may hold too many for all.
    Raises PluginError when it cannot be loaded.
    """
    from zoo.testing import plugins

    namespace = canonical_namespace(namespace)
    found = [Check(function.__name__, namespace, _bound(function, namespace))
             for function in plugins.CHECKS]
    for spec in _specs(namespace, names):
        for function in (*plugins.SPEC_CHECKS, *_of_its_kind(spec)):
            found.append(Check(function.__name__, spec.name, _bound(function, spec)))
    return found


def run_checks(
    namespace: str,
    expected_failures: Mapping[str, str] | None = None,
    *,
    names: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Run every check and say what it came to. Arguments: see parametrize_with_checks."""
    expected = dict(expected_failures or {})
    collected = checks(namespace, names)
    _want_known(expected, collected)
    for check in collected:
        announced = _announced(check, expected)
        try:
            check()
        except Exception as error:
            yield Outcome(check, "expected" if announced else "failed", announced or _why(error))
        else:
            passed = "it passes; take it out of expected_failures"
            yield Outcome(check, "failed" if announced else "passed", passed if announced else "")


def parametrize_with_checks(
    namespace: str,
    expected_failures: Mapping[str, str] | None = None,
    *,
    names: Sequence[str] = (),
) -> Any:
    """A pytest decorator: the test gets one `check` after another, and calls it.

    namespace: of the plugin. expected_failures: reasons by check name (`"symmetric"`), or by
    subject and check (`"acme/gated-symmetric"`); such a check must fail. names: those of a
    catalogue to check.
    """
    import pytest

    expected = dict(expected_failures or {})
    collected = checks(namespace, names)
    _want_known(expected, collected)
    parameters = []
    for check in collected:
        reason = _announced(check, expected)
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        parameters.append(pytest.param(check, id=check.id, marks=marks))
    return pytest.mark.parametrize("check", parameters)


def _of_its_kind(spec: AnySpec) -> Sequence[Callable[[Any], None]]:
    from zoo.testing import backbones, datasets, fusions, transfers, weights

    if isinstance(spec, FusionSpec):
        return {"weights": weights.CHECKS, "features": fusions.FEATURES,
                "outputs": fusions.OUTPUTS, "choice": fusions.CHOICES}[spec.kind]
    by_type: Mapping[type[Any], Sequence[Callable[[Any], None]]] = {
        BackboneSpec: backbones.CHECKS, TransferSpec: transfers.CHECKS,
        DatasetSpec: datasets.CHECKS}
    return by_type[type(spec)]


def _specs(namespace: str, names: Sequence[str]) -> list[AnySpec]:
    loaded = discovery().load(namespace)
    specs = [replace(spec, name=f"{namespace}/{spec.name}") for spec in loaded.specs.values()]
    for name in names:
        spec = loaded.catalog.find(name) if loaded.catalog is not None else None
        if spec is None:
            raise UnknownName(f"{namespace}/{name}", "thing in a catalogue")
        specs.append(replace(spec, name=f"{namespace}/{spec.name}"))
    return specs


def _bound(function: Callable[[Any], None], subject: Any) -> Callable[[], None]:
    def run() -> None:
        with warnings.catch_warnings():
            # Pooled batch norm is said to users; a check compares what came out.
            warnings.filterwarnings("ignore", message="batch norm's statistics were pooled")
            function(subject)

    return run


def _why(error: Exception) -> str:
    """What a check says, and of an exception of the plugin's own also where it was raised."""
    if isinstance(error, AssertionError | ZooError) and str(error):
        return str(error)
    *_, last = traceback.extract_tb(error.__traceback__)
    told = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{told} (at {last.filename}:{last.lineno})"


def _announced(check: Check, expected: Mapping[str, str]) -> str:
    return expected.get(check.id) or expected.get(check.name) or ""


def _want_known(expected: Mapping[str, str], collected: Sequence[Check]) -> None:
    known = {check.id for check in collected} | {check.name for check in collected}
    for name in expected:
        if name not in known:
            near = suggest(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise OptionError("expected_failures", f"no check is called {name!r}{hint}")
