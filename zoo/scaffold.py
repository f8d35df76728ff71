"""A new plugin of one's own: a copy of `plugins/fusion-zoo-example` under another name.

A wheel of zoo carries that distribution as data beside this file; a checkout has it in `plugins/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from zoo import __version__
from zoo.atomic import atomic_folder
from zoo.discovery import RESERVED, discovery
from zoo.errors import BadName, NamespaceTaken
from zoo.names import canonical_namespace

_COPIED = "fusion-zoo-example"
# Not our text: it says "example" and means one.
_VERBATIM = "LICENSE"


def new_plugin(namespace: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Write a complete plugin distribution for this namespace, and give its folder.

    namespace: as in `acme/gated`. out: the folder, by default `fusion-zoo-acme`; it appears whole
    or not at all. Raises BadName for what is no namespace, NamespaceTaken when it is somebody's,
    FormatError when there is something in the folder.
    """
    name = _wanted(namespace)
    files = renamed(name)
    folder = Path(f"fusion-zoo-{name}" if out is None else out)
    with atomic_folder(folder, may_replace=lambda _: False) as inside:
        for path, content in files.items():
            file = inside / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return folder


def renamed(namespace: str) -> Mapping[PurePosixPath, bytes]:
    """Every file of the distribution as that of this namespace: `my-acme` is the namespace,
    `zoo_my_acme` the module, `fusion-zoo-my-acme` the distribution, and it requires this version
    of zoo."""
    root = _copied()
    return {
        PurePosixPath(_rename(file.relative_to(root).as_posix(), namespace)):
            file.read_bytes() if file.name == _VERBATIM
            else _rename(file.read_text("utf-8"), namespace).encode()
        for file in _files(root, (root / ".gitignore").read_text("utf-8").split())
    }


def _rename(text: str, namespace: str) -> str:
    module = f"zoo_{namespace.replace('-', '_')}"
    text = re.sub("(zoo_)?example", lambda found: module if found[1] else namespace, text)
    return re.sub(r"(?<=fusion-zoo>=)[\w.]+", __version__, text)


def _wanted(namespace: str) -> str:
    """The namespace in its one spelling, when it may be had."""
    name = canonical_namespace(namespace)
    if name.endswith("-") or "--" in name:
        raise BadName(namespace, "a distribution is named after it, so every '-' stands between "
                      "letters or digits")
    if name in RESERVED:
        raise NamespaceTaken(name, RESERVED[name], f"is reserved for {RESERVED[name]}")
    plugin = discovery().get(name)
    if plugin:
        raise NamespaceTaken(name, plugin.distribution, f"is that of {plugin.distribution} "
                             f"{plugin.version}, which is installed")
    return name


def _copied() -> Path:
    """Where the distribution lies that is copied."""
    here = Path(__file__).parent
    shipped = here / _COPIED
    return shipped if shipped.is_dir() else here.parent / "plugins" / _COPIED


def _files(folder: Path, ignored: list[str]) -> Iterator[Path]:
    """What is in a folder but for what git ignores there."""
    for entry in sorted(folder.iterdir()):
        if any(fnmatch(entry.name, pattern.rstrip("/")) for pattern in ignored):
            continue
        if entry.is_dir():
            yield from _files(entry, ignored)
        else:
            yield entry
