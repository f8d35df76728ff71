"""Whether all who can read a pushed model can read the members that it links to."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from zoo.hub.repository import asked
from zoo.names import Address

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_AT_ONCE = 8


def closed(api: HfApi, members: Iterable[Address], repository: str, *, private: bool) -> list[str]:
    """A sentence for each repository of a member that others cannot read, or not all of them.

    members: each with its commit. repository, private: to which the model is pushed; what is
    private beside it has the same readers. Raises HubError when the Hub cannot say.
    """
    with ThreadPoolExecutor(_AT_ONCE, "zoo-ask") as pool:
        found = list(pool.map(lambda each: _closed(api, each, repository, private=private),
                              dict.fromkeys(members)))
    return [sentence for sentence in found if sentence]


def _closed(api: HfApi, member: Address, repository: str, *, private: bool) -> str:
    from huggingface_hub import errors

    name, commit = member.location, str(member.revision)

    def look() -> str:
        try:
            info = api.model_info(name, revision=commit)
        except errors.GatedRepoError:
            return "gated"
        except errors.RepositoryNotFoundError:
            return "gone"
        except errors.RevisionNotFoundError:
            return "changed"
        beside = private and name.partition("/")[0] == repository.partition("/")[0]
        return "private" if info.private and not beside else "gated" if info.gated else ""

    return {
        "": "",
        "private": f"{name} is private, so that only those who may read it can load this model",
        "gated": f"{name} is gated, so that only those to whom its owner gives access can load "
                 "this model",
        "gone": f"{name} is gone, or this login does not see it, so that nobody else can load this "
                "model",
        "changed": f"{name} has no commit {commit[:12]} any more, so that nobody else can load "
                   "this model",
    }[asked(name, look)]
