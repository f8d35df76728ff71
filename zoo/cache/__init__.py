"""The folder for what zoo can make again, and small JSON files in it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from zoo.errors import ZooError


def cache_folder() -> Path:
    """`ZOO_CACHE`, or the user's cache folder."""
    given = os.environ.get("ZOO_CACHE")
    if given:
        return Path(given).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("fusion-zoo", appauthor=False))


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a cached file; None when it is absent, damaged or no object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> bool:
    """Replace a cached file at once, so that no reader sees half of it. False when the folder
    cannot be written: a cache is never a reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    except OSError:
        return False
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def ask_once(distribution: str, module: str, version: int) -> dict[str, Any]:
    """The JSON object that `python -m module` prints, asked for once per version of a distribution
    and cached. For catalogues: what takes seconds to import is imported in another process, with
    this one's path.

    version: of the answer's own form; an answer is `{"format": version, …}`. Raises ZooError with
    the last line of what went wrong.
    """
    from importlib import metadata

    file = cache_folder() / f"{distribution}-{metadata.version(distribution)}.json"
    answer = read_json(file)
    if answer is None or answer.get("format") != version:
        answer = _ask(distribution, module)
        write_json(file, answer)
    return answer


def _ask(distribution: str, module: str) -> dict[str, Any]:
    import subprocess

    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    asked = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", module],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, encoding="utf-8",
        check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ZooError(f"{distribution} cannot list its models: {reason}")
    answer: dict[str, Any] = json.loads(asked.stdout)
    return answer
