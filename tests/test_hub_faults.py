"""Every call of a push and a pull × whatever can go wrong with it, at its first, middle and last
call, once and for good: it succeeds by itself or says what to do, a second try completes, and
nothing is ever half there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Fault, Hub
from hub.client import hurried
from huggingface_hub import HfApi
from small_models import saved

import zoo
from zoo.errors import HubError, WeightsError

FILES = ["README.md", "config.json", "model.safetensors"]
# What an error tells the user to do.
ADVICE = ("try again in a few minutes", "run the same again", "load it once while online",
          "run the same again to fetch it anew", "look at its page first")
FAULTS = ("429", "500", "503", "drop", "lost", "slow", "truncate")
# Endpoint → the calls of it that a push makes.
PUSH = {"info": 2, "tree": 1, "create": 1, "validate-yaml": 1, "preupload": 1, "lfs-batch": 1,
        "part": 3, "lfs-complete": 1, "lfs-verify": 1, "commit": 1}
PULL = {"info": 1, "tree": 1, "resolve": 5, "blob": 1}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; the seconds that would have been waited."""
    return hurried(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("faults") / "fused")


def plans(endpoint: str, kind: str, calls: int) -> list[Fault]:
    nths = sorted({1, (calls + 1) // 2, calls})
    return [Fault(endpoint, kind, nth, times) for nth in nths for times in (1, 0)]


def state(hub: Hub, name: str) -> list[str]:
    if name not in hub.store.repositories:
        return []
    return sorted(set(hub.store.repositories[name].commit_of("main").files) - {".gitattributes"})


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("endpoint", PUSH)
def test_push(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str,
              kind: str) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.store.part = -(-(folder / "model.safetensors").stat().st_size // 3)
    for number, fault in enumerate(plans(endpoint, kind, PUSH[endpoint])):
        name = f"me/fused{number}"
        hub.store.large.clear()  # or the second one has nothing to upload
        hub.fail(fault)
        try:
            done = zoo.push(folder, name)
        except HubError as error:
            assert any(advice in str(error) for advice in ADVICE), error
            assert fault.times == 0, f"one {fault} is too much: {error}"
            assert kind != "slow"
            done = None
        assert fault in hub.faults.happened, "it never came to that"
        assert state(hub, name) in ([], FILES)
        if done:
            assert state(hub, name) == FILES
        hub.fail()
        again = zoo.push(folder, name)
        assert state(hub, name) == FILES
        assert len(hub.store.repositories[name].commits) == 2
        assert again.commit == hub.store.repositories[name].commit_of("main").oid
        if done:
            assert (again.uploaded, again.commit) == (0, done.commit)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert hub.leaks == []


def test_what_went_up_before_it_broke_does_not_go_up_again(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    hub.fail(Fault("commit", "503", times=0))
    with pytest.raises(HubError, match="the Hub has trouble"):
        zoo.push(folder, "me/fused")
    assert hub.called("upload") == 1
    hub.fail()
    zoo.push(folder, "me/fused")
    assert hub.called("upload") == 1


def test_a_pull_request_is_not_opened_twice(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = hub.token("me")
    monkeypatch.setenv("HF_TOKEN", token)
    HfApi(token=token).create_repo("me/fused")
    hub.fail(Fault("commit", "lost"))
    with pytest.raises(HubError, match="Whether the pull request was opened is not known"):
        zoo.push(folder, "me/fused", create_pr=True)
    pulls = hub.store.repositories["me/fused"].pulls
    assert len(pulls) == 1
    hub.fail(Fault("commit", "503", times=2))
    assert zoo.push(folder, "me/fused", create_pr=True).pull_request
    assert len(pulls) == 2


def test_it_waits_as_long_as_the_hub_asks(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, impatient: list[float]
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    hub.fail(Fault("commit", "429", times=2))
    zoo.push(folder, "me/fused")
    assert impatient == [1, 1]
    hub.fail(Fault("info", "500", times=2))
    zoo.push(folder, "me/fused")
    assert impatient[2:] == [2, 4]


@pytest.mark.parametrize(("endpoint", "kind"), [
    *((endpoint, kind) for endpoint in PULL for kind in FAULTS), ("blob", "corrupt")])
def test_pull(hub: Hub, folder: Path, tmp_path: Path, endpoint: str, kind: str) -> None:
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    for number, fault in enumerate(plans(endpoint, kind, PULL[endpoint])):
        name, out = f"org/fused{number}", tmp_path / str(number)
        hub.store.seed(name, folder)
        hub.fail(fault)
        try:
            zoo.pull(name, out)
            whole = True
        except WeightsError as error:
            assert any(advice in str(error) for advice in ADVICE), error
            assert fault.times == 0 or kind == "corrupt", f"one {fault} is too much: {error}"
            assert kind != "slow"
            whole = False
        assert fault in hub.faults.happened, "it never came to that"
        assert out.exists() == whole
        hub.fail()
        zoo.pull(name, out)
        found = {file.name: file.read_bytes() for file in out.iterdir()}
        assert {each: found[each] for each in expected} == expected
