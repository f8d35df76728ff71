"""What the Hub's client raises, as one clear sentence that never has a token in it."""

from __future__ import annotations

import errno
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
ATTEMPTS = 3
_LONGEST_WAIT = 60.0  # seconds; a Hub that asks for more is told about instead
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}|(?<=Bearer )\S+")


@dataclass(frozen=True)
class Refusal:
    """Why a call failed: a word for programs, a sentence for people, and after how many seconds it
    may be tried again by itself, None for never."""

    reason: str
    sentence: str
    wait: float | None = None


def patiently(call: Callable[[], T]) -> T:
    """What the call gives; where the Hub was busy or the connection broke, at the third attempt."""
    for attempt in range(1, ATTEMPTS):
        try:
            return call()
        except Exception as error:
            wait = refusal(error, attempt).wait
            if wait is None:
                raise
        time.sleep(wait)
    return call()


def refusal(error: Exception, attempt: int = 1) -> Refusal:
    """What went wrong, from whatever the client raised or wrapped."""
    chain = list(_chain(error))
    for each in chain:
        if getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return Refusal("disk", "the disk is full; make room, or set HF_HOME to a folder on "
                           "another disk, then run the same again")
    found = next((known for each in chain if (known := _known(each, attempt))), None)
    return found or Refusal("other", f"{type(error).__name__}: {_first_line(error)}; check the "
                            "name and the network")


def url_of(error: BaseException) -> str:
    """The address that the failed call asked for; `""` where it is not known."""
    for each in _chain(error):
        response = getattr(each, "response", None)
        try:
            return str((response if response is not None else each).request.url)  # type: ignore[union-attr]
        except (AttributeError, RuntimeError):
            continue
    return ""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the answer, where there was one."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None


def without_token(text: str, error: BaseException | None = None) -> str:
    """The text with every token in it crossed out: that of the login, that of the failed request,
    and whatever looks like one."""
    from huggingface_hub import get_token

    for known in (get_token(), *(_sent(error) if error else ())):
        text = text.replace(known, "hf_…") if known else text
    return _TOKEN.sub("hf_…", text)


def _sent(error: BaseException) -> Iterator[str]:
    for each in _chain(error):
        for holder in (each, getattr(each, "response", None)):
            try:
                given = holder.request.headers.get("authorization")  # type: ignore[union-attr]
            except (AttributeError, RuntimeError):
                continue
            yield str(given or "").removeprefix("Bearer ")


def _known(error: BaseException, attempt: int) -> Refusal | None:
    from huggingface_hub import errors

    names = {kind.__name__ for kind in type(error).__mro__}  # of httpx, in any of its packages
    if isinstance(error, errors.GatedRepoError):
        return Refusal("gated", "its owner gives access on request; ask on its page, then run "
                       "`hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return Refusal("missing", "the Hub has no such repository, or it is private; check the "
                       "name, or log in")
    if isinstance(error, errors.RevisionNotFoundError):
        return Refusal("revision", "the repository has no such revision; leave it out for the "
                       "newest")
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return _status(error, attempt)
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata"):
        return Refusal("refused", "the Hub does not accept the card: "
                       + " ".join(without_token(str(error), error).split()))
    if isinstance(error, json.JSONDecodeError):
        return Refusal("busy", "the Hub's answer could not be read; try again", 2.0 ** attempt)
    if isinstance(error, errors.OfflineModeIsEnabled) or "ConnectError" in names:
        return Refusal("offline", "the Hub cannot be reached; check the network, and that "
                       "HF_HUB_OFFLINE is not set")
    if type(error) is ConnectionError:
        return _xet(error)
    if "TransportError" in names or isinstance(error, (ConnectionError, TimeoutError)):
        return Refusal("broken", "the connection to the Hub broke; run the same again, what is "
                       "there already is kept", 2.0 ** attempt)
    return None


def _status(error: Any, attempt: int) -> Refusal:
    status = error.response.status_code
    answer = error.response.headers.get("X-Error-Message") or getattr(error, "server_message", "")
    said = without_token(str(answer or "").strip(". "), error)
    told = f" ({said})" if said else ""
    if status == 401:
        return Refusal("login", f"the Hub does not accept the login{told}; run `hf auth login` "
                       "with a new token")
    if status in (402, 403):
        return Refusal("rights", f"this login may not do that{told}; use a token with the role "
                       "'write' of somebody who may, or open a pull request")
    if status == 412:
        return Refusal("changed", "somebody else has pushed to it meanwhile; look at it, then run "
                       "the same again")
    if status == 429 or status >= 500:
        asked = str(error.response.headers.get("Retry-After") or "")
        wait = float(asked) if asked.isdigit() else 2.0 ** attempt
        what = "asks to wait" if status == 429 else "has trouble"
        return Refusal("busy", f"the Hub {what} (HTTP {status}); try again in a few minutes, what "
                       "is there already is kept", wait if wait <= _LONGEST_WAIT else None)
    return Refusal("refused", f"the Hub refuses it (HTTP {status}){told}")


def _xet(error: ConnectionError) -> Refusal:
    """What hf-xet raises, after minutes of attempts of its own: a text with an HTTP status."""
    status = re.search(r"\((\d{3}) ", str(error))
    if status and status[1] == "404":
        return Refusal("refused", "this Hub has no Xet, and the client goes the other way only if "
                       "it is told; set HF_HUB_DISABLE_XET=1 and run the same again")
    if status and status[1] in ("401", "403"):
        return Refusal("rights", "this login may not do that; use a token with the role 'write' "
                       "of somebody who may")
    return Refusal("broken", "the connection to the Hub's store broke; run the same again, what "
                   "is there already is kept, or set HF_HUB_DISABLE_XET=1 to do without Xet")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _first_line(error: BaseException) -> str:
    return without_token((str(error).strip().splitlines() or [""])[0], error)
