"""zoo.atomic: after a failure or a kill, a reader finds the old or the new, whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo.atomic
from zoo.atomic import atomic_file, atomic_folder, current_folder
from zoo.errors import FormatError
from zoo.tensors import load_tensors, save_tensors


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"


def fill(path: Path, text: str, *, may_replace: bool = True, fail: bool = False) -> None:
    with atomic_folder(path, lambda folder: may_replace) as folder:
        (folder / "file").write_text(text)
        if fail:
            raise RuntimeError("out of ink")


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_made_and_replaced(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr("ctypes.CDLL", lambda name, use_errno: object())
    path = tmp_path / "new" / "model [1]"
    fill(path, "first", may_replace=False)
    fill(path, "second")
    assert (path / "file").read_text() == "second"
    assert names(path.parent) == ["model [1]"]
    (path / "file").unlink()
    fill(path, "into the empty folder", may_replace=False)
    with pytest.raises(RuntimeError, match="out of ink"):
        fill(path, "never", fail=True)
    assert (path / "file").read_text() == "into the empty folder"
    assert names(path.parent) == ["model [1]"]


def test_everything_is_on_disk_when_the_folder_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    fill(tmp_path / "model", "text")
    order = (tmp_path / "model" / "file", tmp_path / "model", tmp_path)
    assert synced == [path.stat().st_ino for path in order]


def test_a_folder_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    fill(tmp_path / "link", "first")
    fill(tmp_path / "link", "second")
    assert (tmp_path / "model" / "file").read_text() == "second"
    assert (tmp_path / "link").is_symlink()


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    (tmp_path / "notes").touch()
    with pytest.raises(FormatError, match="a folder with other things in it; empty it or choose"):
        fill(tmp_path / "photos", "", may_replace=False)
    with pytest.raises(FormatError, match="is a file; choose another name for the folder"):
        fill(tmp_path / "notes", "")
    assert (tmp_path / "photos" / "cat.png").exists()


def test_leftovers_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    deleted = [f".model.{host}.{dead.pid}.0123abcd.tmp"]
    kept = [
        f".model.{host}.{os.getppid()}.0123abcd.tmp",  # runs
        f".model.elsewhere.{dead.pid}.0123abcd.tmp",  # may run there
        f".model2.{host}.{dead.pid}.0123abcd.tmp",  # is another target's
    ]
    for name in deleted + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / f".file.{host}.{dead.pid}.0123abcd.tmp").touch()
    fill(tmp_path / "model", "text")
    with atomic_file(tmp_path / "file"):
        pass
    assert names(tmp_path) == sorted([*kept, "model", "file"])


# Forks processes that save a folder and die at the 1st, 2nd, … line of the code that does it,
# and prints what a reader finds after each death: the version, and where it was.
DIE_EVERYWHERE = """
import ctypes, importlib.util, os, shutil, signal, sys
from pathlib import Path

where, target, exchange = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True"
spec = importlib.util.spec_from_file_location("atomic", where)  # without torch: starts faster
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
os.fsync = lambda descriptor: None  # a kill loses no page; only a power cut does
if not exchange:
    ctypes.CDLL = lambda name, use_errno: object()

def save(version):
    with atomic.atomic_folder(target, lambda folder: True) as folder:
        for name in ("config.json", "model.safetensors", "README.md"):
            (folder / name).write_text(str(version))

def die_after(lines):
    def trace(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename in (where, shutil.__file__):
            lines -= event == "line"
            if lines < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace
    sys.settrace(trace)

save(0)
for version in range(1, 1000):
    child = os.fork()
    if not child:
        die_after(version)
        save(version)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    folder = atomic.current_folder(target)
    print(version, *sorted(file.read_text() for file in folder.iterdir()), folder.name)
    if not os.WIFSIGNALED(status):
        break
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_after_a_kill_anywhere_the_folder_is_the_old_or_the_new_one(
    exchange: bool, tmp_path: Path
) -> None:
    target = tmp_path / "model"
    package = Path(zoo.atomic.__file__)
    finished = subprocess.run(
        [sys.executable, "-c", DIE_EVERYWHERE, package, target, str(exchange)],
        env={**os.environ, "PYTHONPATH": str(package.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stderr == ""
    rows = [line.split() for line in finished.stdout.splitlines()]
    old = "0"
    for version, *found, _ in rows:
        assert found in ([old] * 3, [version] * 3)
        old = found[0]
    seen = [version == found for version, found, *_ in rows]
    assert seen.count(False) > 30  # killed before the swap
    assert seen.count(True) > 5  # and after it
    assert {name for *_, name in rows} == ({"model"} if exchange else {"model", ".model.old"})
    assert names(tmp_path) == ["model"]


def test_a_reader_takes_the_folder_that_was_set_aside(tmp_path: Path) -> None:
    """As a kill between the two renames leaves it, where folders cannot be exchanged."""
    aside = tmp_path / ".model.old"
    aside.mkdir()
    save_tensors({"a": torch.arange(3)}, aside / "model.safetensors")
    assert current_folder(tmp_path / "model") == aside
    assert load_tensors(tmp_path / "model")["a"].tolist() == [0, 1, 2]
    fill(tmp_path / "model", "new")
    assert current_folder(tmp_path / "model") == tmp_path / "model"
    assert names(tmp_path) == ["model"]
