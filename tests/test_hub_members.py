"""Members of a fusion that lie on the Hub: fetched side by side, each repository once."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub.utils import enable_progress_bars
from small_models import fused, saved

import zoo
from zoo.errors import WeightsError

MEMBERS = [f"hf-hub:org/m{number}" for number in range(4)]


@pytest.fixture
def commits(hub: Hub, tmp_path: Path) -> list[str]:
    folder = saved(tmp_path / "fused")
    return [hub.store.seed(name.removeprefix("hf-hub:"), folder) for name in MEMBERS]


def revisions(model: zoo.Model) -> list[object]:
    return [member.source["revision"] for member in model.each_member()]


def test_repositories_are_fetched_side_by_side(
    hub: Hub, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(len(MEMBERS), timeout=20)
    handler: Any = hub._servers[0].RequestHandlerClass

    def waiting(answer: Callable[..., object]) -> Callable[..., object]:
        def wait(*request: object) -> object:
            together.wait()  # breaks, and with it the fetching, unless all of them ask at once
            return answer(*request)
        return wait

    monkeypatch.setattr(handler, "routes", [
        (methods, pattern, name, waiting(answer) if name == "info" else answer)
        for methods, pattern, name, answer in handler.routes])
    model = zoo.fuse(MEMBERS, "mean", device="cpu")
    assert revisions(model) == commits
    assert hub.called("info") == len(MEMBERS)


def test_a_repository_that_is_named_twice_is_fetched_once(hub: Hub, commits: list[str]) -> None:
    first, second, *_ = MEMBERS
    model = zoo.fuse([first, second, first], "mean", device="cpu")
    assert hub.called("info") == 2
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = fused()(pixels).log_softmax(1)
        assert torch.allclose(model(pixels), expected, atol=1e-5)


def test_the_base_is_fetched_with_them(hub: Hub, commits: list[str]) -> None:
    model = zoo.fuse(MEMBERS[:2], "task_arithmetic", base=MEMBERS[0], device="cpu")
    assert hub.called("info") == 2
    assert model.recipe["base"]["revision"] == commits[0]
    assert "task_arithmetic" in str(zoo.plan(MEMBERS[:2], base=MEMBERS[0]))
    assert hub.called("info") == 4


def test_the_error_names_the_member(hub: Hub, commits: list[str]) -> None:
    with pytest.raises(WeightsError) as caught:
        zoo.fuse([*MEMBERS, "hf-hub:org/nothing@v1"], "mean")
    assert str(caught.value) == (
        "hf-hub:org/nothing@v1 cannot be had: the Hub has no such repository, or it is private; "
        "check the name, or log in")


def test_one_line_of_progress(
    hub: Hub, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setenv("ZOO_PROGRESS", "1")
    enable_progress_bars()  # the fixture hides the client's own
    zoo.fuse(MEMBERS, "mean", device="cpu")
    lines = told.getvalue().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("fetch from the Hub: 4 repositories in ")
