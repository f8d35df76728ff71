"""The order of the rooms, read from docs/architecture.md, and what every module imports."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zoo

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "zoo"
# In the order in which data meets them; `__init__` is the door and stands before them all.
ROOMS = re.findall(r"^\| `zoo/(\w+)[/`.]",
                   (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE)
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """`zoo.fusion.merging` stands in `fusion`, `zoo` itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def imported(file: Path) -> set[str]:
    """The modules of zoo that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            found.add(node.module or "")
            if node.module == "zoo":
                found.update(f"zoo.{alias.name}" for alias in node.names
                             if (PACKAGE / alias.name).is_dir()
                             or (PACKAGE / f"{alias.name}.py").is_file())
    return {name for name in found if name.partition(".")[0] == "zoo"}


def test_every_module_has_a_room() -> None:
    modules = ["__init__", *(module.name for module in pkgutil.iter_modules([str(PACKAGE)]))]
    assert sorted(ROOMS) == sorted(modules)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_point_up(file: Path) -> None:
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__" or here not in ROOMS:
        return  # the door imports when a name is first asked for; rooms are counted above
    below = ROOMS[ROOMS.index(here) + 1:]
    wrong = sorted(name for name in imported(file) if room_of(name) in below)
    assert not wrong, f"{here} stands above {', '.join(wrong)}"


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import zoo.names\nfrom zoo import discovery, info\n"
                    "def f():\n    from zoo.fusion.heads import align_heads\n    import os\n")
    assert imported(file) == {"zoo", "zoo.names", "zoo.discovery", "zoo.fusion.heads"}
    assert [room_of(name) for name in ("zoo", "zoo.fusion.heads")] == ["__init__", "fusion"]


def test_no_module_carries_the_name_of_a_public_function() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(PACKAGE)])}
    assert not modules & set(zoo.__all__)


def test_every_public_name_has_one_home() -> None:
    text = (PACKAGE / "__init__.py").read_text("utf-8")
    typed = {alias.name: node.module for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("zoo.")
             for alias in node.names}
    assert typed == zoo._HOME
    assert {*typed, "__version__"} == set(zoo.__all__) <= set(dir(zoo))
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'fuze'"):
        zoo.fuze  # noqa: B018


@pytest.mark.parametrize("code", [
    "import zoo",
    "import zoo; zoo.ZooError, zoo.FusionSpec, zoo.Catalog",
    "import zoo; dir(zoo)",
])
def test_importing_zoo_leaves_the_heavy_ones_out(code: str) -> None:
    heavy = ("torch", "timm", "pluggy", "huggingface_hub", "numpy", "pydantic", "typer")
    check = f"{code}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_stay_short() -> None:
    long = {str(file.relative_to(PACKAGE)): lines for file in FILES
            if (lines := len(file.read_text("utf-8").splitlines())) > 400}
    assert not long
