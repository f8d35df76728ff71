"""Compiled loops: the same bytes as without them, used where they pay, and never needed."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.fusion import compiled
from zoo.fusion.weights import sce
from zoo.fusion.weights.dare_linear import dare_linear
from zoo.fusion.weights.task_vectors import elected
from zoo.tensors import load_tensors, save_tensors

# Whole in one pass, in several, and not worth passes; one with rows.
SHAPES = {"large": (1200, 900), "square": (300, 320), "odd": (70_001,), "small": (40, 3)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and three members; some entries are zero, of both signs."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = {key: 0.02 * torch.randn(shape) for key, shape in SHAPES.items()}
    base["odd"][:40] = 0.0
    base["odd"][40:80] = -0.0
    names = [str(folder / "base.safetensors")]
    save_tensors(base, names[0])
    for number in range(3):
        member = {key: value + 1e-3 * torch.randn(value.shape) * (torch.rand(value.shape) < 0.9)
                  for key, value in base.items()}
        member["odd"][20 * number:20 * number + 40] = -0.0
        names.append(str(folder / f"m{number}.safetensors"))
        save_tensors(member, names[-1])
    return names


@pytest.fixture
def merged(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """What a merge writes, with the loops or without."""
    monkeypatch.setattr(compiled, "WORTH", 0)
    monkeypatch.setattr(compiled, "_failed", False)

    def merge(strategy: str, loops: bool, **options: Any) -> dict[str, bytes]:
        monkeypatch.setenv("ZOO_COMPILED", "1" if loops else "0")
        out = zoo.merge(files[1:], strategy, base=files[0], out=tmp_path / "out.safetensors",
                        **options)
        assert (compiled.kernels(torch.zeros(3)) is not None) == loops
        return contents(out)

    return merge


def contents(file: Path) -> dict[str, bytes]:
    """The bytes of each tensor."""
    return {key: value.view(torch.uint8).numpy().tobytes()
            for key, value in load_tensors(file).items()}


CASES = [
    *(("ties", {"density": density, "election": election, "normalise": normalise, "scale": 0.4})
      for density, election, normalise in product(
          (0.2, [0.1, 0.5, 1.0]), ("sum", "count"), (True, False))),
    ("ties", {"convention": "mergekit", "density": 0.3}),
    ("ties", {"weight": [1.0, -0.5, 2.0]}), ("ties", {"weight": [0.3, 0.0, 0.7]}),
    ("breadcrumbs", {"density": 0.8, "gamma": 0.05}),
    ("breadcrumbs", {"density": 0.8, "gamma": 0.05, "normalise": True, "scale": 0.3}),
    ("breadcrumbs_ties", {"density": [0.5, 0.8, 1.0], "gamma": 0.05}),
    ("dare_linear", {"density": 0.3, "scale": 0.4}),
    ("dare_linear", {"density": 0.3, "convention": "mergekit", "normalise": True}),
    ("dare_ties", {"density": 0.3}), ("dare_ties", {"density": [0.3, 0.6, 1.0], "rescale": False}),
    ("della", {"density": 0.5, "epsilon": 0.1}), ("della", {"density": 0.5, "ranks": "binned"}),
    ("della_linear", {"density": [0.5, 0.4, 1.0], "epsilon": 0.1, "rescale": False}),
    ("della_linear", {"density": 0.5, "convention": "mergekit"}),
    ("sce", {"select_topk": 0.2}), ("sce", {"select_topk": 1.0, "scale": 0.5}),
    ("sce", {"select_topk": 0.3, "convention": "mergekit", "weight": [0.2, 0.3, 0.5]}),
    ("pcb", {}),
]


@pytest.mark.parametrize(("strategy", "options"), CASES)
def test_the_bytes_are_the_same(merged: Any, strategy: str, options: dict[str, Any]) -> None:
    assert merged(strategy, True, **options) == merged(strategy, False, **options)


def test_signs_of_zeros_do_not_depend_on_the_cut() -> None:
    for size in (1, 7, 40, 1037):  # PyTorch computes what a vector has no room for by other steps
        zeros = torch.full((size,), -0.0)
        for normalise in (False, True):
            merged = elected([zeros.clone(), zeros.clone()], [0.5, 1.0], normalise=normalise)
            assert merged.signbit().sum() == 0


def test_norms_are_added_up_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    start = torch.randn(70_001)
    tensors = [start + torch.randn(70_001).exp() for _ in range(3)]
    found = []
    for loops in ("1", "0"):
        monkeypatch.setenv("ZOO_COMPILED", loops)
        compiled.expect(compiled.WORTH)
        found.append(sce.measure(tensors, base=start, shape=(140_002,), measured=(),
                                 select_topk=1.0))
    assert torch.equal(*found)


def test_gradients_pass() -> None:
    compiled.expect(compiled.WORTH)
    member = torch.randn(5, requires_grad=True)
    dare_linear([member], base=torch.zeros(5), key="k", weight=[1.0], density=1.0).sum().backward()
    assert member.grad.tolist() == [1.0] * 5


def test_results_of_half_the_width(merged: Any) -> None:
    plain, loops = (merged("ties", loops, dtype="bfloat16", rounding="stochastic")
                    for loops in (False, True))
    assert loops == plain


def test_inputs_of_half_the_width_and_one_member(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "WORTH", 0)
    for name in files[:2]:
        save_tensors({key: value.half() for key, value in load_tensors(name).items()},
                     tmp_path / Path(name).name)
    written = []
    for loops in ("1", "0"):
        monkeypatch.setenv("ZOO_COMPILED", loops)
        out = zoo.merge([tmp_path / "m0.safetensors"], "sce", base=tmp_path / "base.safetensors",
                        out=tmp_path / "out.safetensors", select_topk=0.5)
        written.append(contents(out))
    assert written[0] == written[1]


def test_a_numba_that_does_not_work_is_done_without(
    merged: Any, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged("ties", True)
    (tmp_path / "numba.py").write_text("raise ImportError('it needs another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "zoo.fusion.kernels")
    monkeypatch.delattr("zoo.fusion.kernels")
    monkeypatch.setattr(compiled, "_kernels", None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = zoo.merge(files[1:], "ties", base=files[0], out=tmp_path / "out.safetensors")
    assert "it needs another numpy" in " ".join(str(each.message) for each in told)
    assert contents(out) == expected


def test_a_small_merge_does_not_load_it(files: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, zoo; zoo.merge({files[1:]!r}, 'ties', "
         f"base={files[0]!r}, out={out!r}); print('numba' in sys.modules)"],
        capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


FULL = """
from numba.core import caching
def full(*arguments):
    raise OSError(28, 'No space left on device')
caching.IndexDataCacheFile._save_data = full
"""


@pytest.mark.parametrize(("environment", "prelude", "problem"), [
    ({"NUMBA_DISABLE_JIT": "1"}, "", "without it: NUMBA_DISABLE_JIT is set"),
    ({"ATEN_CPU_CAPABILITY": "default"}, "", "PyTorch rounds otherwise"),  # it may have no effect
    ({"NUMBA_CACHE_DIR": "kept"}, FULL, ""),
])
def test_where_it_cannot_be_used(
    files: list[str], tmp_path: Path, environment: dict[str, str], prelude: str, problem: str
) -> None:
    """No compiler, other roundings, no room to keep what was compiled."""
    script = prelude + f"""
import os, warnings, zoo
from zoo.fusion import compiled
from zoo.fusion.weights import sce
from zoo.fusion.weights.dare_linear import dare_linear
from zoo.fusion.weights.task_vectors import elected
warnings.simplefilter("always")
compiled.WORTH = 0
for loops in "01":
    os.environ["ZOO_COMPILED"] = loops
    zoo.merge({files[1:]!r}, "ties", base={files[0]!r}, out=f"{{loops}}.safetensors",
              scale=0.4)
print(compiled._kernels is not None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, **environment}, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.strip() == "True" or problem in done.stderr
    assert contents(tmp_path / "0.safetensors") == contents(tmp_path / "1.safetensors")
