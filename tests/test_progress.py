from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest

from zoo.progress import say, task, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A stderr that is a wide terminal. No fixture: pytest puts its own in between."""
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.delenv("ZOO_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return stderr


def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A stderr that is a file, and progress asked for."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("ZOO_PROGRESS", "1")
    return stderr


def test_hidden_without_a_terminal_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ZOO_PROGRESS", raising=False)
    items = [1, 2, 3]
    assert track(items, "training") is items
    with task("merging", 2) as advance:
        advance()
        advance(5)
    assert capsys.readouterr() == ("", "")


def test_hidden_on_a_terminal_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    monkeypatch.setenv("ZOO_PROGRESS", "0")
    assert list(track(range(3), "training")) == [0, 1, 2]
    assert stderr.getvalue() == ""


def test_a_log_gets_one_line_per_finished_outer_task(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = log(monkeypatch)
    for _ in track(range(2), "epochs"):
        assert list(track(iter("abc"), "training", unit="batches")) == ["a", "b", "c"]
    with task("merging") as advance:
        advance(1000)
        advance()
    epochs, merged = stderr.getvalue().splitlines()
    assert re.fullmatch(r"epochs: 2 it in \d+\.\d s \([\d,.]+ it/s\)", epochs)
    assert merged.startswith("merging: 1,001 it in")


def test_a_log_that_was_silent_for_long_gets_a_line_for_an_inner_task(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = log(monkeypatch)
    clock = iter([0.0, 1.0, 8.0, 9.0, 11.0, 11.0, 12.0, 13.0, 40.0, 40.0])
    monkeypatch.setattr("zoo.progress.time.perf_counter", lambda: next(clock))
    for _ in track(range(1), "stage"):
        for epoch in ("one", "two", "three"):
            assert list(track(range(7), epoch, unit="images")) == list(range(7))
    two, stage = stderr.getvalue().splitlines()
    assert two == "two: 7 images in 2.0 s (3.5 images/s)"
    assert stage == "stage: 1 it in 40.0 s (0.025 it/s)"


def test_what_is_said_inside_a_task_is_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = log(monkeypatch)
    with task("stages"):
        say("source: linear_probe")
    assert stderr.getvalue().splitlines()[0] == "source: linear_probe"


def test_a_log_gets_no_line_for_a_task_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = log(monkeypatch)
    with pytest.raises(KeyError), task("merging"):
        raise KeyError
    assert stderr.getvalue() == ""
    with task("next", 1) as advance:
        advance()
    assert stderr.getvalue().startswith("next: 1 it in")


def test_a_terminal_shows_count_and_nested_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    for _ in track(range(2), "stage [one]"):
        assert list(track(iter("abc"), "epoch", total=3, unit="batches")) == ["a", "b", "c"]
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", stderr.getvalue())
    *_, last = text.splitlines()
    assert re.search(r"^epoch .* 0/3", text, re.MULTILINE)
    assert re.match(r"stage \[one\] .* 2/2 [\d,.]+ it/s ", last)


def test_a_failure_closes_the_display_for_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        sum(1 / item for item in track([1, 0], "first"))
    assert list(track(range(2), "second")) == [0, 1]
    shown_second = stderr.getvalue().partition("second")
    assert shown_second[1]
    assert "first" not in shown_second[2]


def test_print_goes_to_a_piped_stdout_and_not_to_the_display(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = terminal(monkeypatch)
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with task("evaluating", 1):
        print('{"accuracy": 1}')
    assert pipe.getvalue() == '{"accuracy": 1}\n'
    assert "accuracy" not in stderr.getvalue()


def test_neither_torch_nor_rich_is_imported_for_hidden_progress() -> None:
    code = ("import sys; from zoo.progress import track; list(track([1], 'x')); "
            "print({'torch', 'rich'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
