"""The benchmarks are too long to run here; what they import must be where they look for it."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("path", [
    pytest.param(path, id=str(path.relative_to(BENCHMARKS)))
    for path in sorted(BENCHMARKS.rglob("*.py"))])
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "zoo":
            continue
        assert node.module is not None
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            there = hasattr(module, name) or (
                hasattr(module, "__path__") and find_spec(f"{node.module}.{name}"))
            assert there, f"line {node.lineno}: {node.module} has no {name}"
