"""`zoo new-plugin`: what it writes, under which names, and what it leaves alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import zoo
from zoo import discovery
from zoo.cli import main
from zoo.errors import BadName, FormatError, NamespaceTaken
from zoo.scaffold import new_plugin, renamed
from zoo.testing import run_checks

ROOT = Path(__file__).parents[1]
COPIED = ROOT / "plugins" / "fusion-zoo-example"
Capture = pytest.CaptureFixture[str]
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*") if file.is_file()}


def test_what_is_copied_is_the_distribution_in_this_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=COPIED,
        capture_output=True, text=True, check=True).stdout
    ours = {name: (COPIED / name).read_bytes() for name in listed.rstrip("\0").split("\0")}
    assert {str(path): content for path, content in renamed("example").items()} == ours


def test_every_name_is_the_new_ones() -> None:
    files = written(new_plugin("my_acme"))
    texts = {path: content.decode() for path, content in files.items()}
    mentions = [path for path, text in texts.items() if "example" in f"{path} {text}".lower()]
    assert mentions == ["LICENSE"]
    project = tomllib.loads(texts["pyproject.toml"])
    assert project["project"]["name"] == "fusion-zoo-my-acme"
    assert project["project"]["version"]
    assert project["project"]["dependencies"] == [f"fusion-zoo>={zoo.__version__}"]
    assert project["project"]["entry-points"]["zoo.plugins"] == {"my-acme": "zoo_my_acme"}
    assert "zoo_my_acme/geometric_median.py" in files
    assert 'build="zoo_my_acme.log_pool:LogPool"' in texts["zoo_my_acme/__init__.py"]
    assert 'parametrize_with_checks("my-acme")' in texts["tests/test_conformance.py"]
    assert "zoo check my-acme" in texts[".github/workflows/ci.yml"]


def test_a_namespace_may_hold_the_copied_one() -> None:
    folder = new_plugin("an-example")
    assert (folder / "zoo_an_example" / "__init__.py").is_file()
    assert b'"an-example/log_pool"' in (folder / "README.md").read_bytes()


def test_it_requires_the_version_that_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.scaffold.__version__", "7.8.9rc1")
    assert b'["fusion-zoo>=7.8.9rc1"]' in (new_plugin("acme") / "pyproject.toml").read_bytes()


def test_it_keeps_the_rules_and_passes_our_lint(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = "a-rather-long-name"  # lines may grow by this much
    folder = new_plugin(namespace)
    lint = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config",
            str(ROOT / "pyproject.toml"), str(folder)]
    assert subprocess.run(lint, capture_output=True, text=True).stdout == "All checks passed!\n"

    install(namespace, "")  # its metadata
    monkeypatch.syspath_prepend(str(folder))
    discovery.reset()
    assert zoo.list_fusions(f"{namespace}/*") == [
        f"{namespace}/{name}" for name in ("geometric_median", "hadamard", "log_pool")]
    assert zoo.list_backbones(f"{namespace}/*") == [f"{namespace}/convmixer"]
    outcomes = list(run_checks(namespace))
    assert len(outcomes) > 40
    assert [outcome for outcome in outcomes if outcome.state != "passed"] == []


def test_the_command_says_what_comes_next(here: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(["new-plugin", "my_acme", "-o", "deep/my plugin"])
    assert not end.value.code
    assert capsys.readouterr().out.splitlines()[1:] == [
        "  cd 'deep/my plugin'", "  pip install -e . pytest", "  pytest", "  zoo check my-acme"]
    assert (here / "deep" / "my plugin" / "pyproject.toml").is_file()


@pytest.mark.parametrize(("namespace", "message"), [
    ("Acme", "'Acme' is not a name: a namespace is lower-case letters"),
    ("", "'' is not a name"),
    ("acme/gated", "'acme/gated' is not a name"),
    ("../acme", "'../acme' is not a name"),
    ("acme-", "'acme-' is not a name: a distribution is named after it"),
    ("ac__me", "'ac__me' is not a name: a distribution is named after it"),
    ("timm", "the namespace 'timm' is reserved for fusion-zoo; choose another"),
    ("example", "the namespace 'example' is reserved for fusion-zoo-example; choose another"),
])
def test_a_namespace_that_cannot_be_had(here: Path, namespace: str, message: str) -> None:
    with pytest.raises((BadName, NamespaceTaken)) as caught:
        new_plugin(namespace)
    assert str(caught.value).startswith(message)
    assert list(here.iterdir()) == []


def test_a_namespace_that_somebody_has(
    install: Install, here: Path, capsys: Capture
) -> None:
    install("my-acme", "raise ValueError('even when it is broken')", distribution="their-fusions",
            version="2.3")
    with pytest.raises(NamespaceTaken) as caught:
        new_plugin("my_acme")
    assert (caught.value.namespace, caught.value.owner) == ("my-acme", "their-fusions")
    with pytest.raises(SystemExit, match="1"):
        main(["new-plugin", "my-acme"])
    assert capsys.readouterr() == ("", "zoo: the namespace 'my-acme' is that of their-fusions 2.3, "
                                       "which is installed; choose another\n")
    assert list(here.iterdir()) == []


def test_nothing_is_overwritten(here: Path) -> None:
    (here / "fusion-zoo-acme").mkdir()
    new_plugin("acme")  # into an empty folder
    (here / "fusion-zoo-acme" / "README.md").write_text("mine")
    before = written(here)
    with pytest.raises(FormatError, match="a folder with other things in it; empty it or choose"):
        new_plugin("acme")
    (here / "file").write_text("mine")
    with pytest.raises(FormatError, match="is a file; choose another name"):
        new_plugin("acme", out="file")
    assert written(here) == {**before, "file": b"mine"}


@pytest.mark.parametrize("killed", [False, True])
def test_a_failure_halfway_leaves_nothing(here: Path, killed: bool) -> None:
    """The kernel allows no file as long as the licence: an error, or the end of the process."""
    code = ("import resource, signal\nfrom zoo.scaffold import new_plugin\n"
            f"signal.signal(signal.SIGXFSZ, signal.SIG_{'DFL' if killed else 'IGN'})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))\nnew_plugin('acme')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode not in (0, 2)
    assert not (here / "fusion-zoo-acme").exists()
    left = list(here.iterdir())
    assert len(left) == killed
    if killed:
        assert written(left[0])  # it had begun
    else:
        assert "File too large" in done.stderr
    new_plugin("acme")
    assert [entry.name for entry in here.iterdir()] == ["fusion-zoo-acme"]


def test_what_git_ignores_is_not_copied(here: Path) -> None:
    """Beside a package as in a wheel, where pip has compiled the copy."""
    package = here / "site" / "zoo"
    shutil.copytree(ROOT / "zoo", package, ignore=shutil.ignore_patterns("__pycache__"))
    for junk in ("dist/a.whl", "build/b", "zoo_example/__pycache__/c.pyc", "d.egg-info/PKG-INFO",
                 ".venv/e", ".pytest_cache/f"):
        file = package / "fusion-zoo-example" / junk
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("junk")
    shutil.copytree(COPIED, package / "fusion-zoo-example", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("__pycache__"))
    code = ("import sys; sys.path.insert(0, 'site')\nfrom zoo import scaffold\n"
            "assert 'site' in scaffold.__file__\nscaffold.new_plugin('acme')")
    subprocess.run([sys.executable, "-B", "-c", code], check=True)
    expected = {str(path): content for path, content in renamed("acme").items()}
    assert written(here / "fusion-zoo-acme") == expected
