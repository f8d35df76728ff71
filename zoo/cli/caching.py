"""`zoo cache`: what is kept in the cache folder, and how much of it."""

from __future__ import annotations

from typing import Annotated

import typer

from zoo.cli import output
from zoo.cli.app import Json
from zoo.cli.values import duration, size

cache = typer.Typer(
    help="What networks gave of images, kept so that it is not computed again: list it, clear it, "
         "limit its size.")


@cache.callback(invoke_without_command=True)
def _list_by_default(context: typer.Context, json: Json = False) -> None:
    if context.invoked_subcommand is None:
        ls(json=json)


@cache.command(epilog=output.examples("zoo cache ls", "zoo cache ls --json"))
def ls(json: Json = False) -> None:
    """List what is kept, last used first: which model, which data, how large."""
    from zoo.cache.kept import kept_files, limit, other_files

    output.cached(kept_files(), other_files(), limit(), json)


@cache.command(epilog=output.examples("zoo cache clear", "zoo cache clear --older-than 7d"))
def clear(
    older_than: Annotated[str | None, typer.Option(
        help="Only what was not used for so long: 7d, 12h, 30m.")] = None,
) -> None:
    """Delete what is kept. All of it can be computed again."""
    from zoo.cache.kept import clear

    output.cleared(*clear(0 if older_than is None else duration(older_than)))


@cache.command(name="limit", epilog=output.examples("zoo cache limit 2GB", "zoo cache limit 0"))
def limit_(
    size_: Annotated[str | None, typer.Argument(
        metavar="SIZE", help="2GB, 500MB, …; 0 keeps nothing. Without it, say the limit.")] = None,
) -> None:
    """Set how much is kept at most, from now on; those last used stay."""
    from zoo.cache.kept import limit, set_limit

    if size_ is not None:
        set_limit(size(size_))
    output.limited(limit())
