"""A Space: a small Gradio app on the Hub in which a visitor tries a fused model on a picture."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from zoo import __version__
from zoo.atomic import atomic_folder
from zoo.errors import FormatError, HubError
from zoo.hub.repository import api_for, asked, repository_of, standing
from zoo.hub.space_app import app_text
from zoo.names import Address
from zoo.store import read_config
from zoo.store.contents import CONFIG
from zoo.store.fetching import hub_folder
from zoo.store.hashes import git_oid

GRADIO = "6.31.0"  # what the app was tried with
FILES = ("README.md", "app.py", "requirements.txt")


def write_space(
    repository: str, out: str | os.PathLike[str], *, beside: Sequence[str] = ()
) -> Path:
    """Write the folder of a Space that shows a model of the Hub: app, requirements, README.

    repository: the model, `org/name` or `org/name@rev`. out: the folder, replaced if it is an
    earlier Space and nothing else. beside: other models of the Hub whose answers are shown too;
    those inside a fusion of outputs are anyway.
    Gives the folder. Raises HubError when the Hub has no such model, WeightsError when it cannot be
    had, FormatError when it is of another kind or `out` holds other things.
    """
    model = _address(repository)
    others = [_address(each) for each in beside]
    _want_models([model, *others])
    names = {_short(other, others): str(other) for other in others}
    front = {
        "title": model.location.partition("/")[2], "emoji": "🧬", "colorFrom": "blue",
        "colorTo": "green", "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py",
        "models": [each.location for each in (model, *others)], "tags": ["fusion-zoo"],
    }
    told = yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()
    folder = Path(out).expanduser()
    with atomic_folder(folder, _is_only_a_space) as fresh:
        for name, text in {
            "app.py": app_text(model.location, str(model), names),
            "requirements.txt": f"fusion-zoo=={__version__}\n",
            "README.md": f"---\n{told}\n---\n\n# {model.location}\n\nDrop a picture and see what "
                         "the members and the fused model say of it. Written by `zoo space`.\n",
        }.items():
            (fresh / name).write_text(text, "utf-8")
    return folder


def push_space(
    folder: str | os.PathLike[str], repository: str, *, private: bool | None = None,
    exist_ok: bool = False, token: str | None = None,
) -> str:
    """Publish the folder of a Space, in one commit or none where all of it is there.

    repository: of the Space, `org/name`. private: of a new one. exist_ok: replace the app of one
    that is there. token: by default that of `hf auth login` or HF_TOKEN.
    Gives the Space's address. Raises HubError with what to do.
    """
    from huggingface_hub import CommitOperationAdd, errors

    place = Path(folder).expanduser()
    if not _is_only_a_space(place):
        raise FormatError(place, "is no Space; `zoo space` writes one")
    name, revision = repository_of(repository)
    if revision:
        raise HubError(name, "refused", "a Space is pushed to main; leave the revision out")
    api = api_for(name, token, writes=True)

    def look() -> tuple[dict[str, str], bool]:
        try:
            hidden = bool(api.space_info(name).private)
            return {entry.path: getattr(entry, "blob_id", "")
                    for entry in api.list_repo_tree(name, repo_type="space")}, hidden
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return {}, True

    there, hidden = asked(name, look)
    if private and not hidden:
        raise HubError(name, "public", "the Space is public and private=True was asked for; make "
                       "it private on its settings page, or choose another name")
    mine = {each: git_oid((place / each).read_bytes()) for each in FILES}
    address = f"{api.endpoint}/spaces/{name}"
    if mine.items() <= there.items():
        return address
    if "app.py" in there and not exist_ok:
        raise HubError(name, "taken", "there is a Space of this name with an app in it; choose "
                       "another name, or say exist_ok=True (--exist-ok) to replace it")
    asked(name, lambda: api.create_repo(name, repo_type="space", space_sdk="gradio",
                                        private=private, exist_ok=True))
    # Made twice, where the first answer got lost, it changes nothing the second time.
    asked(name, lambda: api.create_commit(
        name, [CommitOperationAdd(each, str(place / each)) for each in FILES
               if mine[each] != there.get(each)],
        repo_type="space", commit_message="Show a model of fusion-zoo"))
    return address


def _address(given: str) -> Address:
    name, revision = repository_of(given)
    return Address("hf-hub", name, revision)


def _short(one: Address, every: Sequence[Address]) -> str:
    """What its column is called: the name without the organisation, where that says it."""
    name = one.location.partition("/")[2]
    alike = [each for each in every if each.location.partition("/")[2] == name]
    return name if len(alike) == 1 else str(one).removeprefix("hf-hub:")


def _want_models(addresses: Iterable[Address]) -> None:
    """Whether the Hub has these, before an app is written that could not start."""
    for each in addresses:
        found = standing(api_for(each.location, None, writes=False), each.location, each.revision)
        if CONFIG not in found.files:
            what = ("it has no config.json, so it is no model that zoo loads" if found.commit
                    else "the Hub has no such repository or revision, or it is private; push the "
                    "model first, check the name, or log in")
            raise HubError(each.location, "files" if found.commit else "missing", what)
        if not any(name.endswith(".safetensors") for name in found.files):
            raise FormatError(str(each), "is no model that zoo reads: it has no safetensors")
        read_config(hub_folder(each, only={CONFIG: ""})[0])


def _is_only_a_space(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    return names == set(FILES) and "sdk: gradio" in (folder / "README.md").read_text("utf-8")
