"""Parse and print names.

A slash makes a registered name (`timm/resnet18.a1_in1k`), a colon an address
(`hf-hub:org/name@rev`), and a path looks like one: a `pathlib.Path`, or a string that starts
with `.`, `/` or `~`, or with a drive letter and a colon. A bare name is the core's own.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from zoo.errors import BadName

MODEL_SCHEMES = ("hf-hub", "local-dir")
DATA_SCHEMES = ("folder", "csv", "hfds", "wds", "torch")

_NAMESPACE = re.compile(r"[a-z][a-z0-9-]*")
_LOCAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_DRIVE = re.compile(r"[A-Za-z]:([\\/]|$)")
# A page of the Hub, as a browser has its address: repository and revision.
_PAGE = re.compile(r"(?:hf-hub:)?(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/"
                   r"([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve|commit)/([\w.%-]+))?(?:[/?#].*)?")
_SCHEME = re.compile(r"([a-z][a-z0-9-]+):(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Name:
    """A registered name. `namespace` is None for a bare name, which means the core's own."""

    namespace: str | None
    local: str

    def __str__(self) -> str:
        return self.local if self.namespace is None else f"{self.namespace}/{self.local}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where something lies: `scheme:location`, with `@revision` for `hf-hub`."""

    scheme: str
    location: str
    revision: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}:{self.location}{revision}"


Reference: TypeAlias = Name | Address | Path


def canonical_namespace(text: str) -> str:
    """The one spelling of a namespace: `My_Acme` is no namespace, `my_acme` is `my-acme`.

    Raises BadName when the text is not `[a-z][a-z0-9-]*` (`_` counts as `-`).
    """
    name = text.replace("_", "-")
    if not _NAMESPACE.fullmatch(name):
        raise BadName(text, "a namespace is lower-case letters, digits and '-', a letter first")
    return name


def is_path(given: object) -> bool:
    """Whether this is spelled as a path (it need not exist)."""
    if isinstance(given, os.PathLike):
        return True
    return isinstance(given, str) and (given[:1] in (".", "/", "~") or bool(_DRIVE.match(given)))


def parse(given: str | os.PathLike[str]) -> Reference:
    """Read a user's spelling.

    >>> parse("timm/resnet18.a1_in1k")
    Name(namespace='timm', local='resnet18.a1_in1k')
    >>> parse("hf-hub:org/name@main")
    Address(scheme='hf-hub', location='org/name', revision='main')
    >>> str(parse("ties"))
    'ties'

    Raises BadName for what is neither a name, an address nor a path.
    """
    if is_path(given):
        return Path(given).expanduser()
    text = str(given)
    if not text:
        raise BadName(text, "it is empty")
    if match := _SCHEME.fullmatch(text):
        return _address(text, match[1], match[2])
    namespace, slash, local = text.partition("/")
    if not slash:
        return Name(None, _local(text, text))
    if "/" in local:
        raise BadName(text, f"a name has one slash; write './{text}' for a path")
    try:
        return Name(canonical_namespace(namespace), _local(text, local))
    except BadName as error:
        hint = f"for a Hub repository write 'hf-hub:{text}', for a path './{text}'"
        raise BadName(text, f"{error.problem}; {hint}") from None


def suggest(
    given: str, known: Iterable[str], n: int = 3, cutoff: float = 0.6
) -> list[str]:
    """The nearest known spellings, best first; empty when nothing is near. cutoff: how much alike,
    in [0, 1]."""
    by_folded: dict[str, str] = {}
    for name in known:
        by_folded.setdefault(_fold(name), name)
    near = difflib.get_close_matches(_fold(given), by_folded, n=n, cutoff=cutoff)
    return [by_folded[name] for name in near]


def natural(text: str) -> tuple[list[int | str], str]:
    """A sorting key under which `resnet9` comes before `resnet18`, whatever the case."""
    # Splitting at a group gives text and digits in turn, so numbers only ever meet numbers.
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdecimal() else part for part in parts], text


def _address(text: str, scheme: str, location: str) -> Address:
    page = _PAGE.fullmatch(location if scheme == "hf-hub" else text)
    if page and not page[1].startswith(("datasets/", "spaces/")):
        found = Address("hf-hub", page[1], page[2] and unquote(page[2]))
        raise BadName(text, f"it is the address of a page; write {str(found)!r}")
    if scheme not in (*MODEL_SCHEMES, *DATA_SCHEMES):
        near = suggest(scheme, (*MODEL_SCHEMES, *DATA_SCHEMES))
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MODEL_SCHEMES)}"
        raise BadName(text, f"{scheme!r} is no address scheme; {hint}")
    if not location:
        raise BadName(text, "nothing follows the colon")
    if scheme != "hf-hub":
        return Address(scheme, location)
    repository, at, revision = location.partition("@")
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?", repository) or ".." in repository:
        raise BadName(text, "a Hub address is 'hf-hub:org/name' or 'hf-hub:org/name@revision'")
    if at and not revision:
        raise BadName(text, "nothing follows the '@'")
    return Address(scheme, repository, revision or None)


def _local(text: str, local: str) -> str:
    if not _LOCAL.fullmatch(local):
        raise BadName(text, "letters, digits and '._+-' make a name, with one '/' before them")
    return local


def _fold(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
