"""Visible progress for long work, on stderr.

Shown when stderr is a terminal; `ZOO_PROGRESS=1` always shows it and `ZOO_PROGRESS=0` never. Of
several processes that train together (torchrun and `accelerate launch` number them in `RANK` and
`LOCAL_RANK`) the first one shows it.
Where it is shown and there is no terminal (the log of a CI run), each finished task is one line; a
task inside another one stays silent, unless the log has been for ten seconds.
"""

from __future__ import annotations

import operator
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

# A terminal has room for one live display: the outermost task opens it, the others join it.
_display: Progress | None = None

# In a log: how many tasks are open, since when there was no line, and how long that may last.
_open = 0
_silent_since = 0.0
_SILENCE = 10.0


class Advance(Protocol):
    """Says that so many steps are done."""

    def __call__(self, steps: int = 1, /) -> None: ...


def track(
    iterable: Iterable[T], description: str, total: int | None = None, unit: str = "it"
) -> Iterable[T]:
    """The same items, with their progress shown, its rate and the time that is left.

    total: how many there are, when the iterable cannot say. unit: what one item is (`images`).
    Hidden progress costs nothing: the iterable itself comes back.
    """
    if not _shown():
        return iterable
    return _tracked(iterable, description, total or operator.length_hint(iterable) or None, unit)


def task(
    description: str, total: int | None = None, unit: str = "it"
) -> AbstractContextManager[Advance]:
    """A piece of work whose steps are no iterable: `with task("merge", 60) as advance: advance()`.

    total: how many steps there are, None when unknown. unit: what one step is (`tensors`).
    """
    if not _shown():
        return nullcontext(_ignore)
    return (_bar if _on_terminal() else _line)(description, total, unit)


def say(text: str) -> None:
    """One line about what begins now, where progress is shown."""
    if not _shown():
        return
    if _display is not None:
        _display.console.print(text, markup=False, highlight=False)
    else:
        _tell(text)


def _tracked(
    iterable: Iterable[T], description: str, total: int | None, unit: str
) -> Iterator[T]:
    with task(description, total, unit) as advance:
        for item in iterable:
            yield item
            advance()


def _shown() -> bool:
    if os.environ.get("LOCAL_RANK") and os.environ.get("RANK", "0") != "0":
        return False
    return {"0": False, "1": True}.get(os.environ.get("ZOO_PROGRESS", ""), _on_terminal())


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _ignore(steps: int = 1, /) -> None:
    pass


@contextmanager
def _line(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    global _open, _silent_since
    done = 0

    def advance(steps: int = 1, /) -> None:
        nonlocal done
        done += steps

    start = time.perf_counter()
    if not _open:
        _silent_since = start
    _open += 1
    try:
        yield advance
    finally:
        _open -= 1
    now = time.perf_counter()
    if _open and now - _silent_since < _SILENCE:
        return
    seconds = max(now - start, 1e-9)
    _tell(f"{description}: {done:,} {unit} in {seconds:.1f} s ({_rate(done / seconds)} {unit}/s)")


def _tell(line: str) -> None:
    global _silent_since
    print(line, file=sys.stderr, flush=True)
    _silent_since = time.perf_counter()


def _rate(per_second: float) -> str:
    return f"{per_second:,.1f}" if per_second >= 1 else f"{per_second:.2g}"


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Advance]:
    global _display
    outermost = _display is None
    display = _display = _display or _new_display()
    row = display.add_task(description, total=total, unit=unit)

    def advance(steps: int = 1, /) -> None:
        display.advance(row, steps)

    try:
        if outermost:
            display.start()
        yield advance
    finally:
        if outermost:
            _display = None
            display.stop()
        else:
            display.remove_task(row)


def _new_display() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{_rate(speed)} {task.fields['unit']}/s")

    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        RateColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True),
        # rich would send print() to the display's own stream, stderr, out of a pipe's reach.
        redirect_stdout=sys.stdout.isatty(),
    )
