"""What the Hub's client raises, as one clear sentence that never has a token in it."""

from __future__ import annotations

import errno
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
ATTEMPTS = 3
_LONGEST_WAIT = 60.0  # seconds; a Hub that asks for more is told about instead
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{6,}|(?<=Bearer )\S+")
_SIGNED = re.compile(r"(https?://[^\s?]+)\?[^\s),]+")  # an address that is as good as a login
_XET_TOKEN = re.compile(r"/xet-(read|write)-token/")
_NO_XET = "set HF_HUB_DISABLE_XET=1 to do without Xet"


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
        if _errno(each) in (errno.ENOSPC, errno.EDQUOT):
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


def through_xet(error: BaseException) -> bool:
    """Whether it comes out of hf-xet, which raises Python's own kinds of errors: only the client's
    functions on the way there tell."""
    return any("xet" in frame.f_code.co_name
               and frame.f_globals.get("__name__", "").startswith("huggingface_hub.")
               for each in _chain(error)
               for frame, _ in traceback.walk_tb(each.__traceback__))


def without_token(text: str, error: BaseException | None = None) -> str:
    """The text with every token in it crossed out: that of the login, that of the failed request,
    whatever looks like one, and what follows the `?` of addresses."""
    from huggingface_hub import get_token

    for known in (get_token(), *(_sent(error) if error else ())):
        text = text.replace(known, "hf_…") if known else text
    return _SIGNED.sub(r"\1?…", _TOKEN.sub("hf_…", text))


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
    if isinstance(error, errors.HFValidationError):
        return Refusal("other", "the Hub has no such names: " + _first_line(error).rstrip("."))
    if isinstance(error, UnicodeEncodeError):  # of a header
        return Refusal("login", "the token has characters that no token has; run `hf auth login`, "
                       "or set HF_TOKEN anew")
    if "UnsupportedProtocol" in names:
        return Refusal("offline", "HF_ENDPOINT is no address of a Hub: it begins with https://")
    if isinstance(error, json.JSONDecodeError):
        return Refusal("busy", "the Hub's answer could not be read; try again", 2.0 ** attempt)
    if isinstance(error, errors.OfflineModeIsEnabled) or "ConnectError" in names:
        return Refusal("offline", "the Hub cannot be reached; check the network, and that "
                       "HF_HUB_OFFLINE is not set")
    if "TransportError" not in names and through_xet(error):
        return _xet(error, attempt)
    if "TransportError" in names or isinstance(error, (ConnectionError, TimeoutError)):
        return Refusal("broken", "the connection to the Hub broke; run the same again, what is "
                       "there already is kept", 2.0 ** attempt)
    return None


def _status(error: Any, attempt: int) -> Refusal:
    response = error.response
    answer = response.headers.get("X-Error-Message") or getattr(error, "server_message", "")
    said = without_token(str(answer or "").strip(". "), error)
    asked = str(response.headers.get("Retry-After") or "")
    wait = float(asked) if asked.isdigit() else 2.0 ** attempt
    try:
        reads = response.request.method in ("GET", "HEAD")
    except (AttributeError, RuntimeError):  # httpx's, where an answer has no request
        reads = False
    url = url_of(error)
    reads = reads and "/xet-write-token/" not in url
    return _answered(response.status_code, url, reads, f" ({said})" if said else "",
                     wait if wait <= _LONGEST_WAIT else None)


def _answered(status: int, url: str, reads: bool, told: str, wait: float | None) -> Refusal:
    if status == 401:
        return Refusal("login", f"the Hub does not accept the login{told}; run `hf auth login` "
                       "with a new token")
    if status in (402, 403) and reads:
        return Refusal("rights", f"this login may not read that{told}; run `hf auth login` with a "
                       "token of somebody who may, or ask its owner")
    if status in (402, 403):
        return Refusal("rights", f"this login may not do that{told}; use a token with the role "
                       "'write' of somebody who may, or open a pull request")
    if status == 404 and _XET_TOKEN.search(url):
        return Refusal("refused", "this Hub has no Xet, and the client goes the other way only if "
                       "it is told; set HF_HUB_DISABLE_XET=1 and run the same again")
    if status == 412:
        return Refusal("changed", "somebody else has pushed to it meanwhile; look at it, then run "
                       "the same again")
    if status == 429 or status >= 500:
        what = "asks to wait" if status == 429 else "has trouble"
        return Refusal("busy", f"the Hub {what} (HTTP {status}); try again in a few minutes, what "
                       "is there already is kept", wait)
    return Refusal("refused", f"the Hub refuses it (HTTP {status}){told}")


def _xet(error: BaseException, attempt: int) -> Refusal:
    """What hf-xet raises, after minutes of attempts of its own: of several kinds, and what it was
    is in the text alone."""
    said = _first_line(error)
    found = re.search(r"\((\d{3}) [A-Z]", said)
    status = int(found[1]) if found else 0
    if status in (401, 402, 403) and "?…" in said:  # signed by the Hub, and for a while only
        return Refusal("broken", f"the Hub's store does not take the address that the Hub gave "
                       f"(HTTP {status}); it may have expired: run the same again, or {_NO_XET}")
    if (status in (401, 402, 403, 429) or status >= 500
            or (status == 404 and _XET_TOKEN.search(said))):
        reads = "/xet-read-token/" in said or "/reconstructions/" in said
        return _answered(status, said, reads, "", None)
    network = isinstance(error, (ConnectionError, TimeoutError)) or "sending request" in said
    if network and not status:
        return Refusal("broken", "the connection to the Hub's store broke; run the same again, "
                       f"what is there already is kept, or {_NO_XET}")
    if isinstance(error, ValueError):  # of the client, about where the store is
        return Refusal("busy", "the Hub's answer about its store could not be read; run the same "
                       f"again, or {_NO_XET}", 2.0 ** attempt)
    if isinstance(error, OSError) and not network and type(error).__module__ == "builtins":
        return Refusal("disk", f"Xet cannot use its files on this machine ({said}); look at the "
                       f"folder that HF_XET_CACHE or HF_HOME names, or {_NO_XET}, then run the "
                       "same again")
    return Refusal("broken", f"the Hub's store failed, or has not all of the file ({said}); run "
                   f"the same again, or {_NO_XET}")


def _errno(error: BaseException) -> int | None:
    """hf-xet has it in its text only."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


def _first_line(error: BaseException) -> str:
    return without_token((str(error).strip().splitlines() or [""])[0], error)
