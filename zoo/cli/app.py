"""The command line's application, and the arguments that several commands have."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

app = typer.Typer(
    name="zoo", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Pretrained image models and ways of fusing them, by name.",
)

# A strategy's own options (`--density 0.2`) are not known to the parser; they are checked against
# the strategy's signature.
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the square that members look at, in pixels.")]
Seed = Annotated[int, typer.Option(help="Seed of every random number.")]


@contextmanager
def importing_torch() -> Iterator[None]:
    """For the first use of what imports torch. Its hundreds of thousands of objects stay until the
    end: to look through them for garbage, now, later and at the exit, takes as long as a merge."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
