"""`zoo push`, `zoo pull` and `zoo space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zoo.cli import output
from zoo.cli.app import Json


def push(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repository: Annotated[str, typer.Argument(help="org/name on the Hub.")],
    private: Annotated[bool | None, typer.Option(
        "--private/--public", help="Of a new repository; by default the account's setting.")]
    = None,
    revision: Annotated[str | None, typer.Option(
        help="A branch, made if it is not there; by default main.")] = None,
    create_pr: Annotated[bool, typer.Option(
        "--create-pr", help="Open a pull request instead.")] = False,
    exist_ok: Annotated[bool, typer.Option(
        "--exist-ok", help="Replace the model that the repository holds.")] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Only say what would go up, and what is there.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license_: Annotated[str | None, typer.Option(
        "--license", help="Where the members' licences do not say it: mit, cc-by-nc-4.0, …")]
    = None,
    link_members: Annotated[bool, typer.Option(
        "--link-members", help="Leave weights of members that came from the Hub where they are.")]
    = False,
    closed_members: Annotated[bool, typer.Option(
        "--closed-members", help="Also where others cannot read some of these members.")] = False,
    json: Json = False,
) -> None:
    """Publish a saved model on the Hub in one commit. The login is that of `hf auth login`, or
    HF_TOKEN."""
    import zoo

    output.pushed(zoo.push(
        folder, repository, private=private, revision=revision, create_pr=create_pr,
        exist_ok=exist_ok, dry_run=dry_run, message=message, license=license_,
        link_members=link_members, closed_members=closed_members), json)


def pull(
    repository: Annotated[str, typer.Argument(help="org/name or org/name@revision.")],
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="The folder to write; by default it stays in the Hub's cache.")] = None,
    json: Json = False,
) -> None:
    """Fetch a model from the Hub at one commit, complete and checked."""
    import zoo
    from zoo.hub.repository import repository_of
    from zoo.store.fetching import origin_of

    folder = zoo.pull(repository, out)
    name, _ = repository_of(repository)
    output.pulled(folder, origin_of(folder) or {"repository": name, "revision": folder.name}, json)


def space(
    repository: Annotated[str, typer.Argument(help="The model: org/name or org/name@revision.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("space"),
    beside: Annotated[list[str] | None, typer.Option(
        help="Another model of the Hub to show next to it, org/name; may be repeated.")] = None,
    push_: Annotated[bool, typer.Option("--push", help="Publish it too.")] = False,
    name: Annotated[str | None, typer.Option(
        help="org/name of the Space; by default the model's.")] = None,
    private: Annotated[bool | None, typer.Option(
        "--private/--public", help="Of a new Space; by default the account's setting.")] = None,
    exist_ok: Annotated[bool, typer.Option(
        "--exist-ok", help="Replace the app of a Space that is there.")] = False,
    json: Json = False,
) -> None:
    """Write a small Gradio app in which people try a model of the Hub on their pictures."""
    from zoo.hub.repository import repository_of
    from zoo.hub.space import push_space, write_space

    folder = write_space(repository, out, beside=beside or ())
    url = push_space(folder, name or repository_of(repository)[0], private=private,
                     exist_ok=exist_ok) if push_ else None
    output.space(folder, url, json)
