"""A first-time author's path, in real processes and offline: a new plugin, an edit, green tests, a
wheel, and somebody else's environment in which it is used by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from fresh_venv import fresh_venv

from zoo.scaffold import renamed

ROOT = Path(__file__).parents[1]

MEDIAN = '''"""The median of the members: Yin et al. 2018, arXiv:1803.01498."""

import torch


def median(tensors, *, key, scale: float = 1.0):
    """The median of the members' weights, entry by entry.

    Options:
        scale: what it is multiplied by
    """
    return scale * torch.stack(list(tensors)).median(0).values
'''
TEST = '''import torch

from zoo_acme.median import median


def test_median():
    tensors = [torch.tensor([1.0, 9.0]), torch.tensor([2.0, 7.0]), torch.tensor([6.0, 8.0])]
    assert median(tensors, key="fc.weight", scale=2.0).tolist() == [4.0, 16.0]
'''
MEMBERS = """
import zoo
for seed in range(3):
    zoo.save(zoo.backbone("acme/convmixer", num_classes=4, seed=seed, device="cpu"), f"m{seed}")
"""
LOAD = """
import json, torch, zoo, zoo_acme
fused = zoo.load("./fused", device="cpu").eval()
states = [zoo.load(f"./m{seed}", device="cpu").state_dict() for seed in range(3)]
key = next(key for key in states[0] if key.endswith("head.weight"))
expected = 0.5 * torch.stack([state[key] for state in states]).median(0).values
print(json.dumps({
    "places": [zoo.__file__, zoo_acme.__file__],
    "equal": torch.equal(fused.state_dict()[key], expected),
    "shape": list(fused(torch.rand(2, 3, 32, 32)).shape),
}))
"""


class Environment:
    """A fresh virtual environment whose pip knows one folder of wheels and nothing else."""

    def __init__(self, folder: Path, index: Path) -> None:
        self.python = fresh_venv(folder)
        inherited = {name: value for name, value in os.environ.items()
                     if name not in ("PYTHONPATH", "PYTHONHOME")}
        self.variables = {**inherited, "PATH": f"{self.python.parent}:{os.environ['PATH']}",
                          "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index),
                          "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, cwd: Path) -> str:
        done = subprocess.run(command, cwd=cwd, env=self.variables, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}"
        return done.stdout


def build(project: Path, out: Path, *how: str) -> None:
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out),
                           *how, str(project)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_from_nothing_to_somebody_elses_environment(tmp_path: Path) -> None:
    index, work = tmp_path / "index", tmp_path / "work"
    work.mkdir()
    build(ROOT, index)  # the wheel is made of the sdist, so this checks both

    author = Environment(tmp_path / "author", index)
    author.run("python", "-m", "pip", "install", "fusion-zoo", cwd=work)
    assert "  cd fusion-zoo-acme\n" in author.run("zoo", "new-plugin", "acme", cwd=work)
    plugin = work / "fusion-zoo-acme"
    expected = {str(path): content for path, content in renamed("acme").items()}
    assert expected == {file.relative_to(plugin).as_posix(): file.read_bytes()
                        for file in plugin.rglob("*") if file.is_file()}
    author.run("python", "-m", "pip", "install", "--no-build-isolation", "-e", ".", "pytest",
               cwd=plugin)
    assert passed(author.run("python", "-m", "pytest", "-q", cwd=plugin)) > 50

    edit(plugin)
    assert passed(author.run("python", "-m", "pytest", "-q", cwd=plugin)) > 50
    build(plugin, index, "--wheel")

    user = Environment(tmp_path / "user", index)
    user.run("python", "-m", "pip", "install", "fusion-zoo-acme", cwd=work)
    assert "scale: float = 1.0  what it is" in user.run("zoo", "show", "acme/median", cwd=work)
    user.run("python", "-c", MEMBERS, cwd=work)
    user.run("zoo", "fuse", "m0", "m1", "m2", "--with", "acme/median", "--scale", "0.5",
             "-o", "fused", cwd=work)
    found = json.loads(user.run("python", "-c", LOAD, cwd=work).splitlines()[-1])
    assert all(place.startswith(str(tmp_path / "user")) for place in found.pop("places"))
    assert found == {"equal": True, "shape": [2, 4]}
    config = json.loads((work / "fused" / "config.json").read_text())
    assert config["zoo"]["requires"] == [
        {"namespace": "acme", "requirement": "fusion-zoo-acme>=0.1.0"}]


def passed(printed: str) -> int:
    count = re.search(r"^(\d+) passed in", printed, re.MULTILINE)
    assert count, printed
    return int(count[1])


def edit(plugin: Path) -> None:
    """The author puts a strategy of their own in the place of the copied one."""
    package = plugin / "zoo_acme"
    (package / "geometric_median.py").unlink()
    (plugin / "tests" / "test_geometric_median.py").unlink()
    (package / "median.py").write_text(MEDIAN)
    (plugin / "tests" / "test_median.py").write_text(TEST)
    module = package / "__init__.py"
    module.write_text(module.read_text().replace("geometric_median", "median"))
