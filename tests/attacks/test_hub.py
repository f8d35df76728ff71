"""A server that is not what it says, or sends its visitors elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from hub.routes import Answer
from small_models import saved

import zoo
from zoo.errors import WeightsError

Change = Callable[[str, Answer], Answer | None]


@pytest.fixture
def folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A published model; a token is there, so that it could leak."""
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    folder = saved(tmp_path / "fused")
    hub.store.seed("org/name", folder)
    return folder


@pytest.fixture
def answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Let the server answer otherwise: a function of the endpoint and the honest answer."""
    def change_with(change: Change) -> None:
        for server in hub._servers:
            handler: Any = server.RequestHandlerClass
            honest = handler._send

            def send(self: Any, endpoint: str, answer: Answer, fault: str = "",
                     honest: Any = honest) -> None:
                honest(self, endpoint, change(endpoint, answer) or answer, fault)

            monkeypatch.setattr(handler, "_send", send)

    return change_with


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[Hub]:
    """Another origin, which has the same model and must not see the token."""
    with Hub() as other:
        other.store.seed("org/name", folder)
        yield other


def refused(address: str = "hf-hub:org/name") -> str:
    with pytest.raises(WeightsError) as caught:
        zoo.load(address, device="cpu")
    return str(caught.value)


def outside(tmp_path: Path) -> list[Path]:
    return [file for file in tmp_path.rglob("*") if file.is_file()
            and not file.is_relative_to(tmp_path / "hf" / "hub")
            and not file.is_relative_to(tmp_path / "fused")]


def test_a_redirect_does_not_take_the_token_along(
    hub: Hub, folder: Path, elsewhere: Hub, answers: Callable[[Change], None]
) -> None:
    blob = next(iter(elsewhere.store.large))

    def redirect(endpoint: str, answer: Answer) -> Answer | None:
        if endpoint != "resolve" or answer.status != 302:
            return None
        return Answer(302, b"", {**answer.headers, "Location":
                                 f"{elsewhere.large_url}/blob/{blob}?key={elsewhere.key}"})

    answers(redirect)
    assert zoo.load("hf-hub:org/name", device="cpu")
    assert elsewhere.called("blob") == 1
    assert elsewhere.leaks == []
    assert hub.leaks == []


def test_nor_does_one_of_the_api(
    folder: Path, elsewhere: Hub, answers: Callable[[Change], None]
) -> None:
    answers(lambda endpoint, answer: Answer(302, b"", {
        "Location": f"{elsewhere.large_url}/blob/x"}) if endpoint == "info" else None)
    refused()
    assert elsewhere.leaks == []


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
@pytest.mark.parametrize("value", ["../../../../../evil", "/evil", "..\\evil", ".."])
def test_a_hash_that_is_a_path_is_written_nowhere(
    folder: Path, tmp_path: Path, answers: Callable[[Change], None], header: str, value: str
) -> None:
    value = f"{tmp_path}{value}" if value.startswith("/") else value

    def lie(endpoint: str, answer: Answer) -> Answer | None:
        if endpoint != "resolve":
            return None
        quoted = value if header == "X-Repo-Commit" else f'"{value}"'
        return Answer(answer.status, answer.body, {**answer.headers, header: quoted})

    answers(lie)
    assert f"as the {header} of a file, and it would be written there" in refused()
    assert outside(tmp_path) == []


def test_names_that_are_paths_are_not_fetched(
    folder: Path, tmp_path: Path, answers: Callable[[Change], None]
) -> None:
    evil = ["../../../../evil.safetensors", "/tmp/evil.safetensors", "a/evil.safetensors"]

    def lie(endpoint: str, answer: Answer) -> Answer | None:
        if endpoint == "info":
            more = [{"rfilename": name} for name in evil]
            return Answer(200, {**answer.body, "siblings": [*answer.body["siblings"], *more]})
        if endpoint == "tree":
            like = next(each for each in answer.body if each["path"] == "model.safetensors")
            return Answer(200, [*answer.body, *({**like, "path": name} for name in evil)],
                          answer.headers)
        return None

    answers(lie)
    assert zoo.load("hf-hub:org/name", device="cpu")
    assert outside(tmp_path) == []
    assert list((tmp_path / "hf").rglob("*evil*")) == []


def test_a_commit_that_is_a_path(
    folder: Path, tmp_path: Path, answers: Callable[[Change], None]
) -> None:
    answers(lambda endpoint, answer: Answer(200, {**answer.body, "sha": "../../../../evil"})
            if endpoint == "info" else None)
    refused()
    assert outside(tmp_path) == []


def test_bytes_that_are_not_those_of_the_hash(
    folder: Path, tmp_path: Path, answers: Callable[[Change], None]
) -> None:
    answers(lambda endpoint, answer: Answer(
        answer.status, answer.body[:-1] + bytes([answer.body[-1] ^ 1]), answer.headers)
        if endpoint == "blob" else None)
    assert "model.safetensors is not what the Hub has at commit" in refused()
    assert not list((tmp_path / "hf").rglob("snapshots/*/model.safetensors"))


def test_a_hash_that_fits_other_bytes_than_were_saved(
    hub: Hub, folder: Path, answers: Callable[[Change], None]
) -> None:
    """The server is at one with itself; the config tells what was saved."""
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    hub.store.seed("org/name", folder)
    assert "model.safetensors has changed since the model was saved" in refused()
