"""What a strategy says to a wrong option."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from zoo.errors import ZooError
from zoo.options import core_arguments
from zoo.registry import load
from zoo.specs import AnySpec

# What is outside of most ranges, and small enough to be tried.
_EDGES = {int: (-1, 0), float: (-1.0, 0.0, 1.5)}


def want_errors_that_name(spec: AnySpec, use: Callable[[Mapping[str, Any]], object]) -> None:
    """Use a strategy with numbers at the edge of what its options may be: it works, or its error
    says which option has which value. use: takes the options."""
    for name, value in _edges(spec):
        try:
            use({name: value})
        except ZooError as error:
            words = set(re.findall(r"[\w.-]*\w", str(error)))
            assert any({name, spelled} <= words for spelled in (str(value), f"{value:g}")), (
                f"{spec.name} refuses {name}={value} with {str(error)!r}; let the error name the "
                f"option, what was given and what was expected: '{name} is {value}, expected …'")
        except Exception as error:
            raise AssertionError(
                f"{spec.name} with {name}={value} raises {type(error).__name__}: {error}; check "
                f"the option first: raise OptionError({spec.name!r}, '{name} is {value}, "
                "expected …')") from error


def _edges(spec: AnySpec) -> Iterator[tuple[str, int | float]]:
    """Numbers for the options whose defaults are numbers."""
    for name, parameter in inspect.signature(load(spec)).parameters.items():
        kind = type(parameter.default)
        if parameter.kind is parameter.KEYWORD_ONLY and name not in core_arguments(spec):
            for value in _EDGES.get(kind, ()):
                yield name, value
