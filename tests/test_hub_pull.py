"""Load and pull: at a commit, complete, unchanged, and again without a network."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub import Fault, Hub
from huggingface_hub import constants
from small_models import fused, saved
from torch import Tensor

import zoo
from zoo.errors import DiskFull, FormatError, WeightsError
from zoo.store import fetching


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "fused")


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def source(model: zoo.Model) -> dict[str, object]:
    return dict(next(model.each_member()).source)


def refused(address: str) -> str:
    with pytest.raises(WeightsError) as caught:
        zoo.load(address, device="cpu")
    assert caught.value.__context__ is None
    return str(caught.value)


def test_a_repository_is_loaded_at_a_commit_and_again_offline(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    commit = hub.store.seed("org/name", folder)
    model = zoo.load("hf-hub:org/name@main", device="cpu")
    assert source(model) == {"repository": "org/name", "revision": commit}
    with torch.no_grad():
        assert torch.equal(model(images()), fused()(images()))
    assert not list(tmp_path.rglob("blobs/*.bin")) + list((tmp_path / "hf").rglob("*.bin"))
    assert refused("hf-hub:org/other") == (
        "hf-hub:org/other cannot be had: the Hub has no such repository, or it is private; check "
        "the name, or log in")
    assert refused("hf-hub:org/name@v9") == (
        "hf-hub:org/name@v9 cannot be had: the repository has no such revision; leave it out for "
        "the newest")
    again = zoo.load(zoo.save(model, tmp_path / "saved"), device="cpu")
    assert source(again) == source(model)
    hub.store.seed("org/name", saved(tmp_path / "newer"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for address in ("hf-hub:org/name", f"hf-hub:org/name@{commit}"):
        assert source(zoo.load(address, device="cpu")) == source(model)
    assert source(zoo.backbone(f"hf-hub:org/name@{commit}", device="cpu")) == source(model)
    assert refused("hf-hub:org/unseen") == (
        "hf-hub:org/unseen cannot be had: the Hub cannot be reached and it is not in the cache; "
        "load it once while online")


def test_what_is_there_is_not_fetched_again(hub: Hub, folder: Path) -> None:
    hub.store.seed("org/name", folder)
    zoo.load("hf-hub:org/name", device="cpu")
    fetched = hub.called("blob")
    zoo.load("hf-hub:org/name", device="cpu")
    zoo.pull("org/name")
    assert hub.called("blob") == fetched == 1


def test_what_arrives_is_hashed_on_the_way(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = fetching.sha256_of
    monkeypatch.setattr(fetching, "sha256_of", lambda file: read.append(file.name) or whole(file))
    commit = hub.store.seed("org/name", folder)
    hub.fail(Fault("blob", "slow"))
    assert zoo.pull("org/name").name == commit
    assert read == []
    other = saved(folder.parent / "other")
    damaged = bytearray((other / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (other / "model.safetensors").write_bytes(damaged)
    hub.store.seed("org/other", other)
    hub.fail(Fault("blob", "slow"))
    with pytest.raises(WeightsError, match=r"model\.safetensors has changed since the model"):
        zoo.pull("org/other")
    hub.fail(Fault("blob", "corrupt"))
    other.joinpath("model.safetensors").write_bytes(damaged[:-2] + b"zz")
    hub.store.seed("org/third", other)
    with pytest.raises(WeightsError, match="is not what the Hub has at commit"):
        zoo.pull("org/third")


def test_two_at_once(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.store.seed("org/name", folder)
    threads = [threading.Thread(target=zoo.pull, args=("org/name", tmp_path / str(number)))
               for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(tmp_path / str(number) / "model.safetensors").read_bytes()
                for number in range(3)}) == 1


def test_a_name_that_the_hub_cannot_have(hub: Hub) -> None:
    with pytest.raises(WeightsError, match="a--b cannot be had: the Hub has no such names: Ca"):
        zoo.load("hf-hub:org/a--b", device="cpu")
    assert hub.log == []


@pytest.mark.parametrize(("files", "says"), [
    (["pytorch_model.bin", "config.json"], r"hf-hub:org/x: has its weights as pickles only "
     r"\(pytorch_model\.bin\), which .* never fetched; .*`zoo convert`"),
    (["model.gguf", "README.md"], "is no model that zoo reads: it has no safetensors beside its "
     "page, but README.md, model.gguf"),
    ([], "it has no safetensors beside its page, but nothing"),
])
def test_a_repository_without_weights_that_are_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], says: str
) -> None:
    (tmp_path / "x").mkdir()
    for name in files:
        (tmp_path / "x" / name).write_text("{}")
    hub.store.seed("org/x", tmp_path / "x")
    for get in (zoo.load, zoo.pull):
        with pytest.raises(FormatError, match=says):
            get("hf-hub:org/x")
    assert hub.called("blob") == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="load it once while online"):
        zoo.load("hf-hub:org/x")


def test_gated_and_private_say_what_to_do(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.seed("org/gated", folder, gated=True)
    hub.store.seed("org/private", folder, private=True)
    assert "its owner gives access on request; ask on its page, then run `hf auth login`" in (
        refused("hf-hub:org/gated"))
    assert "or it is private; check the name, or log in" in refused("hf-hub:org/private")
    monkeypatch.setenv("HF_TOKEN", hub.token("alice", "read", ("org",)))
    assert zoo.pull("org/gated") != zoo.pull("org/private")
    assert hub.leaks == []


def test_a_registered_name_takes_its_weights_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    theirs = zoo.backbone("test_vit", image_size=160, seed=5, device="cpu")
    commit = hub.store.seed("timm/test_vit.r160_in1k", zoo.save(theirs, tmp_path / "theirs"))
    ours = zoo.backbone("timm/test_vit", pretrained=True, device="cpu")
    assert source(ours)["revision"] == commit
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


class TestPull:
    def test_a_folder_that_remembers_its_commit(
        self, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = hub.store.seed("org/name", folder)
        out = zoo.pull("hf-hub:org/name", tmp_path / "out")
        for file in folder.iterdir():
            assert (out / file.name).read_bytes() == file.read_bytes()
        assert source(zoo.load(out, device="cpu")) == {"repository": "org/name",
                                                       "revision": commit}
        assert zoo.pull(f"org/name@{commit}", out) == out  # replaces what was pulled before
        monkeypatch.setenv("HF_TOKEN", hub.token("me"))
        done = zoo.push(out, "me/copy")
        assert [file.name for file in done.files] == sorted(file.name for file in
                                                            folder.iterdir())

    def test_nothing_else_is_replaced(self, hub: Hub, folder: Path, tmp_path: Path) -> None:
        hub.store.seed("org/name", folder)
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
        with pytest.raises(FormatError, match="is a folder with other things in it"):
            zoo.pull("org/name", tmp_path / "photos")
        assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
        mine = saved(tmp_path / "mine")
        (mine / "README.md").write_text("# The only copy")
        with pytest.raises(FormatError, match="saved here and not pulled, and would be lost"):
            zoo.pull("org/name", mine)
        assert (mine / "README.md").read_text() == "# The only copy"

    def test_a_full_disk(
        self, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.store.seed("org/name", folder)
        fetch = huggingface_hub.file_download.http_get

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
        with pytest.raises(WeightsError, match="the disk is full; make room, or set HF_HOME"):
            zoo.pull("org/name", tmp_path / "out")
        monkeypatch.setattr(huggingface_hub.file_download, "http_get", fetch)
        zoo.pull("org/name")
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
            with pytest.raises(DiskFull, match="are to be written and the disk has 0 left"):
                zoo.pull("org/name", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert zoo.pull("org/name", tmp_path / "out").is_dir()

    def test_what_is_no_model(self, hub: Hub, folder: Path, tmp_path: Path) -> None:
        (folder / "model.safetensors").unlink()
        hub.store.seed("org/name", folder)
        with pytest.raises(FormatError, match="it has no safetensors beside its page"):
            zoo.pull("org/name", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestIntegrity:
    def damage(self, tmp_path: Path, name: str) -> None:
        """One byte of the cached copy."""
        [link] = (tmp_path / "hf" / "hub").rglob(f"snapshots/*/{name}")
        data = bytearray(link.read_bytes())
        data[-1] ^= 1
        link.resolve().write_bytes(data)

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_a_damaged_copy_is_found_and_fetched_anew(
        self, hub: Hub, folder: Path, tmp_path: Path, name: str
    ) -> None:
        hub.store.seed("org/name", folder)
        expected = zoo.load("hf-hub:org/name", device="cpu")(images())
        self.damage(tmp_path, name)
        message = refused("hf-hub:org/name")
        assert f"{name} is not what the Hub has at commit" in message
        assert "The copy is deleted; run the same again to fetch it anew" in message
        assert torch.equal(zoo.load("hf-hub:org/name", device="cpu")(images()), expected)

    def test_weights_that_changed_since_they_were_saved(
        self, hub: Hub, folder: Path, tmp_path: Path
    ) -> None:
        first = hub.store.seed("org/name", folder)
        other = zoo.save(zoo.backbone("test_vit", num_classes=3, image_size=32, seed=9,
                                      device="cpu"), tmp_path / "other")
        shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
        repository = hub.store.repositories["org/name"]
        hub.store.seed("org/name", folder)
        hub.store.repositories["org/name"].commits.update(repository.commits)
        message = refused("hf-hub:org/name")
        assert "model.safetensors has changed since the model was saved: config.json records" in (
            message)
        assert "Load an earlier revision" in message
        assert zoo.load(f"hf-hub:org/name@{first}", device="cpu")

    def test_a_cache_that_lacks_a_shard(
        self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wide = zoo.fuse([zoo.backbone("test_vit", num_classes=3, image_size=32, seed=seed,
                                      device="cpu") for seed in (1, 2)], "concat")
        zoo.save(wide, tmp_path / "wide", max_shard_bytes=400_000)
        hub.store.seed("org/wide", tmp_path / "wide")
        zoo.pull("org/wide")
        [link] = (tmp_path / "hf").rglob("snapshots/*/model-00002-of-*.safetensors")
        link.unlink()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert refused("hf-hub:org/wide") == (
            "hf-hub:org/wide cannot be had: it is in the cache in part only, and the Hub cannot "
            "be reached; load it once while online")
        [listing] = (tmp_path / "hf").rglob("trees/*.json")
        told = json.loads(listing.read_text())
        del told["files"][link.name]  # an older client keeps no listing
        listing.write_text(json.dumps(told))
        huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
        assert f"{link.name} is missing, in the cache or in the repository" in (
            refused("hf-hub:org/wide"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        listing.unlink()
        huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
        assert zoo.load("hf-hub:org/wide", device="cpu").kind == "features"

    def test_a_licence_comes_from_the_card(
        self, hub: Hub, folder: Path, tmp_path: Path
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["zoo"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# Theirs\n")
        hub.store.seed("org/plain", folder)
        model = zoo.load("hf-hub:org/plain", device="cpu")
        assert source(model)["license"] == "cc-by-nc-4.0"
        made = json.loads((zoo.save(model, tmp_path / "m") / "config.json").read_text())
        assert made["zoo"]["made_with"]["licences"] == ["cc-by-nc-4.0"]
