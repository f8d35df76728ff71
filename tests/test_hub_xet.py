"""What can go wrong where the weights go by Xet, through the stock hf-xet: with the token that it
asks the Hub for, with a store on the network, with the files of a store in a folder, and with its
own on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub import Fault, Hub
from hub.client import hurried, renew_xet
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _runtime
from small_models import saved
from test_hub_faults import FILES, state

import zoo
from zoo.errors import HubError, WeightsError
from zoo.store.answers import refusal

LOGIN = "the Hub does not accept the login"
WRITES = "this login may not do that; use a token with the role 'write'"
READS = "this login may not read that"
NO_XET = "this Hub has no Xet, .* set HF_HUB_DISABLE_XET=1 and run the same again"
BUSY = r"\(HTTP {}\); try again in a few minutes"
BROKEN = "the connection to the Hub('s store)? broke; run the same again"
UNREADABLE = "could not be read; run the same again, or set HF_HUB_DISABLE_XET=1"
FAILED = "the Hub's store failed, or has not all of the file .*; run the same again, or set"
HERE = "Xet cannot use its files on this machine .*; look at the folder that HF_XET_CACHE or"
# Fault → what is said when it stays, on the way up and on the way down.
SAID = {
    "401": (LOGIN, LOGIN), "403": (WRITES, READS), "404": (NO_XET, NO_XET),
    **{kind: (BUSY.format(kind),) * 2 for kind in ("429", "500", "503")},
    **dict.fromkeys(("drop", "lost", "truncate"), (BROKEN, BROKEN)),
    "page": (BROKEN, UNREADABLE), "slow": ("", ""),
}
FINAL = ("401", "403", "404")  # nobody asks again


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("xet") / "fused")


@pytest.fixture(autouse=True)
def by_xet(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hurried(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    hub.store.xet = tmp_path / "store"


def refused(call: Callable[[], object], expected: type[Exception], said: str) -> str:
    with pytest.raises(expected, match=said) as caught:
        call()
    text = str(caught.value)
    assert "check the name and the network" not in text
    assert os.environ["HF_TOKEN"] not in text
    assert "\n" not in text
    assert caught.value.__cause__ is caught.value.__context__ is None, "no traceback of a client's"
    return text


def push_fails(hub: Hub, folder: Path, name: str, said: str) -> str:
    text = refused(lambda: zoo.push(folder, name), HubError, said)
    assert state(hub, name) == []
    return text


def pushes(hub: Hub, folder: Path, name: str) -> None:
    done = zoo.push(folder, name)
    repository = hub.store.repositories[name]
    assert state(hub, name) == FILES
    assert len(repository.commits) == 2
    assert done.commit == repository.commit_of("main").oid
    assert zoo.push(folder, name).commit == done.commit
    assert hub.store.large == {}, "none of it goes the other way"


def pull_fails(name: str, out: Path, said: str) -> str:
    text = refused(lambda: zoo.pull(name, out), WeightsError, said)
    assert not out.exists()
    assert [file for file in Path(constants.HF_HUB_CACHE).rglob("*")
            if file.name == "model.safetensors" or file.suffix == ".incomplete"] == []
    return text


def pulls(folder: Path, name: str, out: Path) -> None:
    zoo.pull(name, out)
    for file in ("config.json", "model.safetensors"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()


def own_cache_of_hub(tmp_path: Path, number: int, patch: pytest.MonkeyPatch) -> None:
    """Where nothing is yet: a file that another repository has as well is not fetched again."""
    patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"hf{number}" / "hub"))


class TestToken:
    @pytest.mark.parametrize("kind", SAID)
    def test_push(self, hub: Hub, folder: Path, kind: str) -> None:
        for name, times in (("me/once", 1), ("me/forever", 0)):
            hub.fail(Fault("xet-token", kind, times=times))
            if kind == "slow" or (times and kind not in FINAL):
                zoo.push(folder, name)
            else:
                push_fails(hub, folder, name, SAID[kind][0])
            assert hub.faults.happened
            hub.fail()
            pushes(hub, folder, name)

    @pytest.mark.parametrize("kind", SAID)
    def test_pull(self, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  kind: str) -> None:
        for number, times in enumerate((1, 0)):
            name, out = f"me/fused{number}", tmp_path / f"out{number}"
            zoo.push(folder, name)
            own_cache_of_hub(tmp_path, number, monkeypatch)
            hub.fail(Fault("xet-token", kind, times=times))
            if kind == "slow" or (times and kind not in FINAL):
                zoo.pull(name, out)
            else:
                pull_fails(name, out, SAID[kind][1])
            assert hub.faults.happened
            hub.fail()
            pulls(folder, name, out)

    def test_no_pull_request_is_opened(self, hub: Hub, folder: Path) -> None:
        HfApi().create_repo("me/fused")
        hub.fail(Fault("xet-token", "503", times=0))
        text = refused(lambda: zoo.push(folder, "me/fused", create_pr=True), HubError, "HTTP 503")
        assert "pull request" not in text
        hub.fail(Fault("xet-token", "400"))
        text = refused(lambda: zoo.push(folder, "me/fused", create_pr=True), HubError, FAILED)
        assert "(400 Bad Request)" in text
        assert "create_pr" not in text, "hf-xet leaves out what may sign an address"
        hub.fail()
        assert zoo.push(folder, "me/fused", create_pr=True).pull_request
        assert len(hub.store.repositories["me/fused"].pulls) == 1


class TestStoreOnTheNetwork:
    """One that only fails; without it, the clients go to the store in the folder."""

    @pytest.mark.parametrize("kind", ["401", "403", "404", "429", "500", "503", "drop"])
    def test_it_answers_with(self, hub: Hub, folder: Path, tmp_path: Path, kind: str) -> None:
        zoo.push(folder, "me/there")
        hub.store.elsewhere = f"{hub.url}/xet"
        hub.fail(Fault("xet-store", kind, times=0))
        up, down = (FAILED, FAILED) if kind == "404" else SAID[kind]
        push_fails(hub, folder, "me/fused", up)
        pull_fails("me/there", tmp_path / "out", down)
        assert hub.called("xet-store") >= 2
        hub.store.elsewhere = ""
        pushes(hub, folder, "me/fused")
        pulls(folder, "me/there", tmp_path / "out")

    @pytest.mark.parametrize(("address", "said"), [
        ("http://127.0.0.1:9", BROKEN), ("nonsense", FAILED)])
    def test_its_address_is_wrong(self, hub: Hub, folder: Path, tmp_path: Path, address: str,
                                  said: str) -> None:
        zoo.push(folder, "me/there")
        hub.store.elsewhere = address
        push_fails(hub, folder, "me/fused", said)
        pull_fails("me/there", tmp_path / "out", said)
        hub.store.elsewhere = ""
        pushes(hub, folder, "me/fused")
        pulls(folder, "me/there", tmp_path / "out")


def cut(data: bytes) -> bytes:
    return data[:len(data) // 2]


def flipped(at: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        return data[:at] + bytes([data[at] ^ 255]) + data[at + 1:]
    return flip


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes] | None, str]] = {
    "block cut": ("xorbs/default.*[0-9a-f]", cut, FAILED),
    "block empty": ("xorbs/default.*[0-9a-f]", lambda data: b"", FAILED),
    "block's head": ("xorbs/default.*[0-9a-f]", flipped(0), FAILED),
    "block's middle": ("xorbs/default.*[0-9a-f]", flipped(500_000), "The copy is deleted; run the"),
    "block gone": ("xorbs/default.*[0-9a-f]", None, FAILED),
    "shard cut": ("shards/*.mdb", lambda data: data[:100], FAILED),
    "shard empty": ("shards/*.mdb", lambda data: b"", FAILED),
    "shard gone": ("shards/*.mdb", None, FAILED),
}


class TestStoreInAFolder:
    @pytest.mark.parametrize("what", DAMAGE)
    def test_damaged(self, hub: Hub, folder: Path, tmp_path: Path,
                     monkeypatch: pytest.MonkeyPatch, what: str) -> None:
        pattern, damage, said = DAMAGE[what]
        zoo.push(folder, "me/fused")
        [file] = (tmp_path / "store").rglob(pattern)
        whole = file.read_bytes()
        file.chmod(0o600)
        if damage:
            file.write_bytes(damage(whole))
        else:
            file.unlink()
        renew_xet(monkeypatch)  # as another machine would come to it
        pull_fails("me/fused", tmp_path / "out", said)
        refused(lambda: zoo.load("hf-hub:me/fused"), WeightsError, said)
        file.write_bytes(whole)
        pulls(folder, "me/fused", tmp_path / "out")
        zoo.load("hf-hub:me/fused", device="cpu")

    @pytest.mark.parametrize("way", ["a file", "closed", "read-only"])
    def test_it_cannot_be_used(self, hub: Hub, folder: Path, tmp_path: Path, way: str) -> None:
        zoo.push(folder, "me/there")
        kept, broken = hub.store.xet, tmp_path / "broken"
        broken.touch() if way == "a file" else broken.mkdir(mode=0 if way == "closed" else 0o500)
        if way != "a file" and os.access(broken, os.W_OK):
            pytest.skip("the superuser may write everywhere")
        hub.store.xet = broken
        push_fails(hub, folder, "me/fused", HERE)
        pull_fails("me/there", tmp_path / "out", HERE)
        hub.store.xet = kept
        pushes(hub, folder, "me/fused")
        pulls(folder, "me/there", tmp_path / "out")

    def test_it_is_gone(self, hub: Hub, folder: Path, tmp_path: Path,
                        monkeypatch: pytest.MonkeyPatch) -> None:
        zoo.push(folder, "me/there")
        kept, hub.store.xet = hub.store.xet, tmp_path / "nowhere"
        pull_fails("me/there", tmp_path / "out", FAILED)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        pull_fails("me/there", tmp_path / "out", "in part only.*load it once while online")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.store.xet = kept
        pulls(folder, "me/there", tmp_path / "out")


def test_its_own_folder_cannot_be_used(hub: Hub, folder: Path, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.push(folder, "me/there")
    hub.store.elsewhere = f"{hub.url}/xet"
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "occupied"))
    renew_xet(monkeypatch)
    push_fails(hub, folder, "me/fused", HERE)
    pull_fails("me/there", tmp_path / "out", HERE)
    assert hub.called("xet-store") == 0
    hub.store.elsewhere = ""
    (tmp_path / "occupied").unlink()
    pushes(hub, folder, "me/fused")
    pulls(folder, "me/there", tmp_path / "out")


def test_a_full_disk_is_known_by_the_text_of_hf_xet() -> None:
    # As it says it on a full tmpfs; it raises a bare OSError, without the number.
    full = OSError("I/O error: IO error: No space left on device (os error 28)")
    assert refusal(full).reason == "disk"


def test_an_address_that_expired() -> None:
    def expired() -> None:
        raise RuntimeError("HTTP status client error (403 Forbidden) for url (https://store.example"
                           "/xorbs/ab?X-Xet-Signed-Range=0&Signature=secret)")

    # As hf-xet raises it, out of a function of the client.
    frame: dict[str, Any] = {"__name__": "huggingface_hub.file_download"}
    exec("def xet_get(call): call()", frame)
    with pytest.raises(RuntimeError) as caught:
        frame["xet_get"](expired)
    told = refusal(caught.value)
    assert told.reason == "broken"
    assert "(HTTP 403); it may have expired: run the same again" in told.sentence
    other = RuntimeError("task failed: https://store.example/xorbs/ab?Signature=secret, sorry")
    assert "https://store.example/xorbs/ab?…, sorry" in refusal(other).sentence


@pytest.mark.parametrize("way", ["switched off", "not installed"])
def test_without_xet(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     way: str) -> None:
    zoo.push(folder, "me/xet")
    assert hub.called("xet-token") == 1
    [oid] = [blob.sha256 for blob in
             hub.store.repositories["me/xet"].commit_of("main").files.values() if blob.xet]
    hub.fail(Fault("xet-token", "503", times=0))
    push_fails(hub, folder, "me/lfs", "or set HF_HUB_DISABLE_XET=1|HTTP 503")
    calls = hub.called("xet-token")
    if way == "switched off":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    else:
        monkeypatch.setitem(_runtime._package_versions, "hf_xet", "N/A")
        monkeypatch.setitem(sys.modules, "hf_xet", None)
    zoo.push(folder, "me/lfs")
    assert state(hub, "me/lfs") == FILES
    assert list(hub.store.large) == [oid]
    # The Hub gives out what came by Xet over HTTP as well.
    for number, name in enumerate(("me/xet", "me/lfs")):
        own_cache_of_hub(tmp_path, number, monkeypatch)
        pulls(folder, name, tmp_path / f"out{number}")
    assert hub.called("xet-token") == calls
    assert hub.leaks == []
