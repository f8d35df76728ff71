"""The Hub's client, with an eye on what a server says."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

from zoo.errors import WeightsError

# The client makes names of files of these.
_NAMES = ("ETag", "X-Linked-Etag", "X-Repo-Commit")
_NAME = re.compile(r"(?!\.)[\w.=+~-]*")


def guard_client() -> None:
    """Let the client refuse answers whose headers would lead out of its cache: it calls its copies
    by what the server says is their hash, and writes to `../../x` where that is the hash.

    Asked for before each download, because the client makes itself anew at times.
    """
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _want_names not in hooks["response"]:
        hooks["response"].append(_want_names)
        session.event_hooks = hooks


def forget_store() -> None:
    """Let the client ask anew where the Hub's Xet store is. It goes where it was told for as long
    as the token lasts, also if nothing answers there."""
    with suppress(ImportError, AttributeError):  # clients that keep nothing
        from huggingface_hub.utils import _xet

        _xet.XET_CONNECTION_INFO_CACHE.clear()


def _want_names(response: Any) -> None:
    """response: httpx's, of whichever package the client brings it from."""
    if "/resolve/" not in response.request.url.path:
        return
    for header in _NAMES:
        given = response.headers.get(header, "").removeprefix("W/").strip('"')
        if not _NAME.fullmatch(given):
            raise WeightsError(f"the server {response.request.url.host} gives {given!r} as the "
                               f"{header} of a file, and it would be written there; it is no Hub, "
                               "or not an honest one: look at HF_ENDPOINT")
