"""A repository on the Hub as zoo asks about it: patiently, and with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from zoo import __version__
from zoo.errors import BadName, HubError
from zoo.names import Address, parse
from zoo.store.answers import patiently, refusal
from zoo.store.contents import is_published

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
_LOGGED_OUT = ("nobody is logged in; run `hf auth login`, or set HF_TOKEN to a token with the role "
               "'write' from the Hub's settings page")


@dataclass(frozen=True)
class Standing:
    """What stands in a repository at a revision. commit: None where there is no such revision yet;
    exists: whether there is a repository at all; files: name → sha256 of a large file, git's hash
    of another; name: of the repository, as the Hub calls it now."""

    exists: bool = False
    private: bool = False
    commit: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    name: str = ""

    @property
    def occupied(self) -> bool:
        """Whether it has anything of a model in it."""
        return any(map(is_published, self.files))


def repository_of(given: str) -> tuple[str, str | None]:
    """`org/name`, `org/name@rev` or the address of either: repository and revision. Raises BadName
    for anything else."""
    if not isinstance(given, str):
        raise BadName(repr(given), "a repository on the Hub is 'org/name', as text")
    try:
        reference = parse(given if given.startswith("hf-hub:") else f"hf-hub:{given}")
    except BadName as error:
        raise BadName(given, error.problem) from None
    assert isinstance(reference, Address)
    if "/" not in reference.location:
        raise BadName(given, "a repository on the Hub is 'org/name', and your own are 'you/name'")
    return reference.location, reference.revision


def api_for(repository: str, token: str | None, *, writes: bool) -> HfApi:
    """The Hub's client. Raises HubError when there is no token and one is needed."""
    from huggingface_hub import HfApi, get_token

    if writes and not (token or get_token()):
        raise HubError(repository, "login", _LOGGED_OUT)
    return HfApi(token=token, library_name="fusion-zoo", library_version=__version__)


def asked(repository: str, call: Callable[[], T]) -> T:
    """What the call gives, at the third attempt at the latest. Raises HubError."""
    try:
        return patiently(call)
    except Exception as error:
        told = refusal(error)
    # Raised out here: what the client raised may hold the token.
    raise HubError(repository, told.reason, told.sentence)


def standing(api: HfApi, repository: str, revision: str | None) -> Standing:
    """What is there. Raises HubError when the Hub cannot say."""
    from huggingface_hub import errors

    def look() -> Standing:
        try:
            info = api.model_info(repository, revision=revision)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return Standing()
        except errors.RevisionNotFoundError:
            info = api.model_info(repository)
            return Standing(exists=True, private=bool(info.private), name=info.id)
        files: dict[str, str] = {}
        for entry in api.list_repo_tree(repository, revision=info.sha):
            blob = getattr(entry, "blob_id", None)
            if blob:
                lfs = getattr(entry, "lfs", None)
                files[entry.path] = lfs.sha256 if lfs else blob
        return Standing(True, bool(info.private), info.sha, files, info.id)

    return asked(repository, look)
