"""Push a model: one commit, or none where everything is there already."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zoo.errors import HubError, OptionError
from zoo.hub.folder import Upload, folder_of, links_in, uploads
from zoo.hub.linked import closed
from zoo.hub.repository import Standing, api_for, asked, repository_of, standing
from zoo.model import Model
from zoo.store.answers import ATTEMPTS, refusal, status_of, through_xet, url_of
from zoo.store.contents import is_outdated

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

State = Literal["new", "changed", "there", "removed"]


@dataclass(frozen=True, kw_only=True)
class PushedFile:
    """One file of a push. size in bytes; state: against what the repository has."""

    name: str
    size: int
    sha256: str
    state: State


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was pushed or, of a dry run, would be; as text, the address of the commit.

    url, commit: of the commit that has the model; None where a dry run found none.
    pull_request: its address, where one was opened. linked: the addresses of members that stay in
    repositories of their own; left_out: bytes of theirs that did not have to go up; closed: a
    sentence for each such repository that not everybody can read, who reads the model.
    """

    repository: str
    revision: str
    files: tuple[PushedFile, ...]
    url: str | None = None
    commit: str | None = None
    pull_request: str | None = None
    dry_run: bool = False
    linked: tuple[str, ...] = ()
    left_out: int = 0
    closed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.url or f"{self.repository}@{self.revision}, not pushed yet"

    @property
    def uploaded(self) -> int:
        """Bytes that went up, or would."""
        return sum(file.size for file in self.files if file.state in ("new", "changed"))

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "uploaded": self.uploaded}


def push(
    model: Model | str | Path,
    repository: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    exist_ok: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    token: str | None = None,
    license: str | None = None,
    link_members: bool = False,
    closed_members: bool = False,
) -> Pushed:
    """Publish a model as a Hub repository: weights, config, card and its pictures in one commit.

    What the repository has already does not go up again; where nothing differs, no commit is made.
    A push that broke off is gone on with by the same call.

    model: a Model, or the folder of a saved one, which is only read. repository: `org/name`.
    private: of a new repository; None leaves it to the account's setting. revision: a branch, made
    if it is not there; by default `main`. create_pr: open a pull request instead. exist_ok: the
    repository may hold another model, which this one replaces. dry_run: only say what would go
    up. message: of the commit. token: by default that of `hf auth login` or HF_TOKEN.
    license: of the model, where those of its members do not say it (see docs/hub.md).
    link_members: leave the weights of members that came from the Hub where they are, as `zoo.save`
        does; a folder that is linked already is pushed so without it. closed_members: push it also
        where some of these repositories are private, gated or gone, and others cannot load it.

    Raises HubError with what to do, FormatError for a folder that is no model.
    """
    name, given = repository_of(repository)
    if given and revision and given != revision:
        raise OptionError("push", f"the revision is both {given!r} and {revision!r}; say it once")
    revision = revision or given
    if create_pr and revision not in (None, "main"):
        raise OptionError("push", "a pull request goes against main; leave the revision out")
    with folder_of(model, name, link_members) as folder:
        api = api_for(name, token, writes=not dry_run)
        files = uploads(folder, name, license)
        there = standing(api, name, revision)
        if there.name not in ("", name):  # it was renamed, and the Hub leads on from the old name
            name = there.name
            files = uploads(folder, name, license)
        if private and there.exists and not there.private:
            raise HubError(name, "public", "the repository is public and private=True was asked "
                           "for; make it private on its settings page, or choose another name")
        planned = _compared(files, there)
        same = there.commit is not None and all(file.state == "there" for file in planned)
        links = links_in(folder)
        answer = Pushed(repository=name, revision=revision or "main", files=planned,
                        dry_run=dry_run, left_out=sum(link.size for link in links),
                        linked=tuple(dict.fromkeys(str(link.address) for link in links)))
        if same:
            return replace(answer, commit=there.commit, url=_url(api, name, str(there.commit)))
        _want_branch(api, name, revision, there)
        may_replace = exist_ok or create_pr or answer.revision.startswith("refs/pr/")
        _want_allowed(name, there, create_pr, may_replace)
        sentences = closed(api, (link.address for link in links), name,
                           private=there.private if there.exists else bool(private))
        answer = replace(answer, closed=tuple(sentences))
        if dry_run:
            return answer
        if sentences and not closed_members:
            raise HubError(name, "members", f"{'; '.join(sentences)}. Carry its members instead "
                           "(without link_members; of a folder, zoo.save(zoo.load(folder), out)), "
                           "or say closed_members=True (--closed-members)")
        base = _prepare(api, name, there, private, revision)
        if not there.exists:  # somebody else may have been quicker
            _want_allowed(name, base, create_pr, may_replace)
        return _commit(api, name, files, answer, base, create_pr, message or "Push a model")


def _compared(files: Sequence[Upload], there: Standing) -> tuple[PushedFile, ...]:
    found = []
    for file in files:
        known = there.files.get(file.name)
        # Only what the Hub keeps as a large file is known there by its sha256.
        same = known is not None and known == (file.sha256 if len(known) == 64 else file.oid)
        state: State = "new" if known is None else "there" if same else "changed"
        found.append(PushedFile(name=file.name, size=file.size, sha256=file.sha256, state=state))
    kept = {file.name for file in files}
    gone = [PushedFile(name=name, size=0, sha256="", state="removed")
            for name in sorted(there.files) if is_outdated(name) and name not in kept]
    return (*found, *gone)


def _want_allowed(name: str, there: Standing, create_pr: bool, may_replace: bool) -> None:
    if create_pr and not there.exists:
        raise HubError(name, "missing", "there is no repository to open a pull request against, "
                       "or this login does not see it; check the name, or push without create_pr")
    if there.occupied and not may_replace:
        raise HubError(name, "taken", "the repository is there already, with something else in "
                       "it; choose another name, say exist_ok=True (--exist-ok) to replace it, or "
                       "create_pr=True (--create-pr) to propose it")


def _want_branch(api: HfApi, name: str, revision: str | None, there: Standing) -> None:
    """Whether a commit can be made there: on a branch, new or not, or an open pull request."""
    if revision in (None, "main"):
        return
    given = str(revision)
    if given.startswith("refs/pr/"):
        if there.commit is None:
            raise HubError(name, "revision", f"there is no pull request {given}; create_pr=True "
                           "(--create-pr) opens one")
        return
    other = given.startswith("refs/") or bool(re.fullmatch("[0-9a-f]{40}", given))
    if not other and there.commit is not None:
        refs = asked(name, lambda: api.list_repo_refs(name))
        other = given not in {branch.name for branch in refs.branches}
    if other:
        raise HubError(name, "revision", f"{given} is no branch, and a commit is made on one; name "
                       "a branch, which is made if it is not there")


def _prepare(api: HfApi, name: str, there: Standing, private: bool | None,
             revision: str | None) -> Standing:
    """A repository and a branch to commit to, and what stands there."""
    if not there.exists:
        asked(name, lambda: api.create_repo(name, private=private, exist_ok=True))
    if revision not in (None, "main") and there.commit is None:
        asked(name, lambda: api.create_branch(name, branch=str(revision), exist_ok=True))
    if there.commit is not None:
        return there
    return standing(api, name, revision)


def _commit(api: HfApi, name: str, files: Sequence[Upload], answer: Pushed, base: Standing,
            create_pr: bool, message: str) -> Pushed:
    """One commit. The client repeats the uploads by itself; the commit is repeated here, and only
    after a look at whether it was made and just the answer got lost."""
    operations = _operations(files, _compared(files, base))
    for attempt in range(1, ATTEMPTS + 1):
        try:
            info: CommitInfo = api.create_commit(
                name, operations, commit_message=message, create_pr=create_pr or None,
                revision=answer.revision, parent_commit=None if create_pr else base.commit)
            return replace(answer, commit=info.oid, url=str(info.commit_url),
                         pull_request=info.pr_url)
        except Exception as error:
            told = refusal(error, attempt)
            url, status = url_of(error), status_of(error)
            uploading = through_xet(error)
        at_commit = not uploading and ("/commit/" in url or not url)
        # Whether the Hub said that it did nothing; otherwise nobody knows.
        undone = not at_commit or status not in (None, 500, 502, 504)
        ours = at_commit or "validate-yaml" in url  # the client repeats the others
        if not create_pr and not undone:
            now = standing(api, name, answer.revision)
            if all(file.state == "there" for file in _compared(files, now)):
                return replace(answer, commit=now.commit, url=_url(api, name, str(now.commit)))
        if told.wait is None or attempt == ATTEMPTS or not ours or (create_pr and not undone):
            break
        time.sleep(told.wait)
    sentence = told.sentence
    if create_pr and not undone:
        sentence += ". Whether the pull request was opened is not known: look at its page first"
    raise HubError(name, told.reason, sentence)


def _operations(files: Sequence[Upload], planned: Sequence[PushedFile]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    by_name = {file.name: file for file in files}
    operations: list[Any] = []
    for each in planned:
        if each.state == "removed":
            operations.append(CommitOperationDelete(each.name))
        elif each.state != "there":
            content = by_name[each.name].content
            add = CommitOperationAdd(each.name, content if isinstance(content, bytes)
                                     else str(content))
            add.upload_info.sha256 = bytes.fromhex(each.sha256)  # or it is read once more
            operations.append(add)
    return operations


def _url(api: HfApi, name: str, commit: str) -> str:
    return f"{api.endpoint}/{name}/commit/{commit}"
