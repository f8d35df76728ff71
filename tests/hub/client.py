"""Point huggingface_hub, in this process, at a Hub on loopback."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, _xet, disable_progress_bars

from hub.server import Hub
from zoo.hub import pushing
from zoo.store import answers


def settings(hub: Hub, home: Path, token: str = "") -> dict[str, str]:
    """The environment of a process that talks to this Hub, with a home folder of its own."""
    return {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }


def connect(hub: Hub, home: Path, patch: pytest.MonkeyPatch) -> None:
    """What the client read from the environment when it was imported, as `settings` would have it.

    It waits between its attempts; here it does not.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    for name, value in {
        "ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored"),
        "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    impatient = types.SimpleNamespace(sleep=lambda seconds: None)
    for module in (_http, file_download):
        patch.setattr(module, "time", impatient)
    patch.setenv("HF_XET_CACHE", str(home / "xet"))
    patch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
    renew_xet(patch)
    disable_progress_bars()


def renew_xet(patch: pytest.MonkeyPatch) -> None:
    """A session of hf-xet reads the environment once, and holds what it opened."""
    patch.setattr(_xet, "_GLOBAL_XET_HOLDER", _xet.XetSessionHolder())


def hurried(patch: pytest.MonkeyPatch) -> list[float]:
    """Zoo does not wait either; the seconds that it would have."""
    waited: list[float] = []
    for module in (pushing, answers):
        patch.setattr(module, "time", types.SimpleNamespace(sleep=waited.append))
    return waited


def environment(hub: Hub, home: Path, token: str = "") -> dict[str, str]:
    """`settings` beside what every process needs."""
    kept = {key: value for key, value in os.environ.items()
            if not key.startswith(("HF_", "HUGGING"))}
    return {**kept, **settings(hub, home, token)}
