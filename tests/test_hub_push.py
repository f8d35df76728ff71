"""Push: what goes up, what does not, and what is said when it cannot."""

from __future__ import annotations

import copy
import errno
import json
import logging
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Fault, Hub
from hub.client import environment
from hub.repositories import Refused
from huggingface_hub import HfApi, ModelCard, constants
from safetensors.torch import load_file, save_file
from small_models import fused, saved

import zoo
from zoo.cli import main
from zoo.errors import BadName, FormatError, HubError, OptionError, WeightsError
from zoo.tensors import writing

FILES = ["README.md", "config.json", "model.safetensors"]
MINE = "---\ntags: [merge]\n---\n# Mine\n"

# Where zoo cannot be imported: plain timm must do.
PLAIN = """
import sys
sys.modules["zoo"] = None
import timm, torch
torch.set_num_threads(int(sys.argv[1]))  # another number rounds sums otherwise
net = timm.create_model("hf-hub:me/fused", pretrained=True).eval()
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    assert torch.equal(net(x), expected)
print("equal")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "fused")


@pytest.fixture
def me(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Logged in as me, with the right to write."""
    token = hub.token("me", organisations=("org",))
    monkeypatch.setenv("HF_TOKEN", token)
    return token


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def files_of(hub: Hub, name: str, revision: str = "main") -> list[str]:
    found = hub.store.repositories[name].commit_of(revision).files
    return sorted(set(found) - {".gitattributes"})


def commits(hub: Hub, name: str) -> int:
    """Without the one that a repository begins with."""
    return len(hub.store.repositories[name].commits) - 1


@pytest.mark.usefixtures("me")
class TestWhatGoesUp:
    def test_one_commit_and_its_address(self, hub: Hub, folder: Path) -> None:
        before = bytes_of(folder)
        done = zoo.push(folder, "me/fused", message="Fuse two")
        head = hub.store.repositories["me/fused"].commit_of("main")
        assert str(done) == done.url == f"{hub.url}/me/fused/commit/{head.oid}"
        assert (done.commit, head.title, commits(hub, "me/fused")) == (head.oid, "Fuse two", 1)
        assert files_of(hub, "me/fused") == FILES
        assert [(file.name, file.state) for file in done.files] == [(n, "new") for n in FILES]
        assert done.uploaded == sum(file.size for file in done.files)
        assert bytes_of(folder) == before

    def test_nothing_is_pushed_twice(self, hub: Hub, folder: Path) -> None:
        first = zoo.push(folder, "me/fused")
        sent = {name: hub.called(name) for name in ("commit", "upload", "lfs-batch", "create")}
        again = zoo.push(folder, "me/fused")
        assert (again.url, again.commit, again.uploaded) == (first.url, first.commit, 0)
        assert {name: hub.called(name) for name in sent} == sent
        elsewhere = zoo.push(folder, "me/other")
        assert elsewhere.commit != first.commit
        assert hub.called("upload") == 1  # the Hub has these bytes, whosever they are

    def test_only_what_differs_goes_up_and_what_is_left_over_goes(
        self, hub: Hub, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "LICENSE").write_text("All of it.")
        zoo.push(folder, "me/fused")
        (folder / "LICENSE").unlink()
        wide = zoo.fuse([zoo.backbone("mnist_cnn", num_classes=3, seed=seed, device="cpu")
                         for seed in (1, 2)], "concat")
        zoo.save(wide, tmp_path / "shards", max_shard_bytes=400_000)
        shards = sorted(file.name for file in (tmp_path / "shards").iterdir())
        assert len(shards) > 4
        done = zoo.push(tmp_path / "shards", "me/fused", exist_ok=True)
        assert files_of(hub, "me/fused") == ["LICENSE", *shards]
        assert {file.name: file.state for file in done.files}["model.safetensors"] == "removed"
        card = folder / "README.md"
        card.write_text(card.read_text() + "\nMore.\n")
        zoo.push(folder, "me/fused", exist_ok=True)
        card.write_text(card.read_text() + "\nEven more.\n")
        third = zoo.push(folder, "me/fused", exist_ok=True)
        assert {file.name: file.state for file in third.files} == {
            "README.md": "changed", "config.json": "there", "model.safetensors": "there"}
        assert third.uploaded == next(file.size for file in third.files)

    def test_a_dry_run_changes_nothing(self, hub: Hub, folder: Path) -> None:
        told = zoo.push(folder, "me/fused", dry_run=True)
        assert [(file.name, file.state) for file in told.files] == [(n, "new") for n in FILES]
        assert [file.size for file in told.files][1:] == [
            (folder / name).stat().st_size for name in FILES[1:]]
        assert (told.url, str(told)) == (None, "me/fused@main, not pushed yet")
        assert hub.store.repositories == {}
        pushed = zoo.push(folder, "me/fused")
        assert [(f.name, f.size, f.sha256) for f in pushed.files] == [
            (f.name, f.size, f.sha256) for f in told.files]
        (folder / "README.md").write_text((folder / "README.md").read_text() + "x")
        told = zoo.push(folder, "me/fused", exist_ok=True, dry_run=True)
        assert [file.state for file in told.files] == ["changed", "there", "there"]
        assert {each[1] for each in hub.log[-2:]} == {"GET"}

    def test_branches_pull_requests_and_private_repositories(
        self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zoo.push(folder, "org/fused", private=True)
        assert hub.store.repositories["org/fused"].private
        (folder / "README.md").write_text(MINE)
        zoo.push(folder, "org/fused@dev/x")
        zoo.push(folder, "org/fused", revision="dev/x")
        monkeypatch.setenv("HF_TOKEN", hub.token("guest", "read", ("org",)))
        asked = zoo.push(folder, "org/fused", create_pr=True)
        assert asked.pull_request == f"{hub.url}/org/fused/discussions/1"
        heads = [hub.store.repositories["org/fused"].commit_of(name) for name in
                 ("main", "dev/x", "refs/pr/1")]
        assert len({head.files["README.md"].oid for head in heads}) == 2
        assert heads[0].files["README.md"] != heads[1].files["README.md"]
        assert commits(hub, "org/fused") == 3

    def test_a_repository_that_was_renamed(self, hub: Hub, folder: Path) -> None:
        first = zoo.push(folder, "me/fused")
        hub.store.renamed["me/old"] = "me/fused"
        again = zoo.push(folder, "me/old")
        assert (again.repository, again.url, again.uploaded) == ("me/fused", first.url, 0)
        zoo.push(folder, "me/old@dev")
        assert "hf-hub:me/fused" in ModelCard.load("me/fused").text
        assert hub.store.repositories["me/fused"].commit_of("dev").oid == first.commit
        assert zoo.pull("me/old").name == first.commit

    @pytest.mark.parametrize("part", [5 << 20, 50_000], ids=["basic", "multipart"])
    def test_the_card_says_how_to_use_it_from_there(self, hub: Hub, part: int) -> None:
        hub.store.part = part
        done = zoo.push(fused(), "me/fused")
        assert {file.name for file in done.files} == set(FILES)
        card = ModelCard.load("me/fused")
        assert 'zoo.load("hf-hub:me/fused")' in card.text
        assert 'timm.create_model("hf-hub:me/fused", pretrained=True)' in card.text
        assert 'pipeline("image-classification", model="me/fused")' in card.text
        assert "path/to" not in card.text
        assert hub.leaks == []

    def test_with_xet(
        self, hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        hub.store.xet = tmp_path / "xet"
        first = zoo.push(folder, "me/fused")
        assert hub.store.large == {}  # none of it went the other way
        blob = hub.store.repositories["me/fused"].commit_of("main").files["model.safetensors"]
        assert blob.size == (folder / "model.safetensors").stat().st_size
        assert zoo.push(folder, "me/fused").commit == first.commit
        (folder / "README.md").write_text(MINE)
        asked = zoo.push(folder, "me/fused", create_pr=True)
        for name in ("one", "two"):
            out = zoo.pull(f"me/fused@{asked.commit}", tmp_path / name)
            for file in FILES:
                assert (out / file).read_bytes() == (folder / file).read_bytes()
            [link] = (tmp_path / "hf" / "hub").rglob("snapshots/*/model.safetensors")
            link.resolve().write_bytes(b"damaged")
            with pytest.raises(WeightsError, match="The copy is deleted; run the same again"):
                zoo.pull(f"me/fused@{asked.commit}", tmp_path / name)
        assert hub.called("xet-token") >= 2
        assert hub.called("blob") == hub.called("lfs-batch") == 0

    def test_it_is_a_plain_timm_model_without_zoo(self, hub: Hub, tmp_path: Path) -> None:
        zoo.push(fused(), "me/fused")
        member = next(fused().each_member())
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.save((member.prepare(images), fused()(images)), tmp_path / "x.pt")
        ran = subprocess.run(
            [sys.executable, "-c", PLAIN, str(torch.get_num_threads()), str(tmp_path / "x.pt")],
            env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=False)
        assert ran.stdout == "equal\n", ran.stderr


@pytest.mark.usefixtures("me")
class TestWhatDoesNotGoUp:
    @pytest.mark.parametrize(("name", "message"), [
        ("pytorch_model.bin", "pytorch_model.bin in .* is a pickle, which can run any program"),
        ("x.pt", "x.pt in .* is a pickle"), ("x.pth", "x.pth in"), ("x.ckpt", "x.ckpt in"),
        ("x.pkl", "x.pkl in .* is a pickle"), ("notes.txt", "notes.txt in .* belongs to no model"),
        ("train.py", "train.py in .* only weights"), ("cat.png", "cat.png in"),
        (".env", r"\.env in .* belongs to no model"),
    ])
    def test_pickles_and_strays_by_name(
        self, hub: Hub, folder: Path, name: str, message: str
    ) -> None:
        (folder / name).write_bytes(b"x")
        with pytest.raises(HubError, match=message) as caught:
            zoo.push(folder, "me/fused")
        assert caught.value.reason == "files"
        assert hub.log == []
        assert name in bytes_of(folder)

    def test_what_is_no_model(self, hub: Hub, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match="there is no such folder"):
            zoo.push(tmp_path / "nothing", "me/fused")
        (folder / "inside").mkdir()
        with pytest.raises(HubError, match=r"inside in .* belongs to no model"):
            zoo.push(folder, "me/fused")
        (folder / "inside").rmdir()
        (folder / "README.md").unlink()
        with pytest.raises(HubError, match=r"has no README\.md"):
            zoo.push(folder, "me/fused")
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(FormatError, match=r"model\.safetensors"):
            zoo.push(folder, "me/fused")
        with pytest.raises(zoo.ZooError, match=r"push takes a zoo\.Model or the folder of one"):
            zoo.push(3, "me/fused")  # type: ignore[arg-type]
        assert hub.log == []

    def test_weights_that_nobody_could_load(self, hub: Hub, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["norm.bias"] += 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(HubError, match="has changed since the model was saved") as caught:
            zoo.push(folder, "me/fused")
        assert (caught.value.reason, hub.log) == ("files", [])
        zoo.save(zoo.load(folder, device="cpu"), folder)
        zoo.push(folder, "me/fused")

    def test_a_commit_is_made_on_a_branch(self, hub: Hub, folder: Path) -> None:
        commit = zoo.push(folder, "me/fused").commit
        HfApi().create_tag("me/fused", tag="v1")
        (folder / "README.md").write_text(MINE)
        for revision, told in [("v1", "v1 is no branch"), (commit, "is no branch"),
                               ("refs/heads/main", "is no branch"),
                               ("refs/pr/1", "there is no pull request refs/pr/1; create_pr=True")]:
            with pytest.raises(HubError, match=told) as caught:
                zoo.push(folder, "me/fused", exist_ok=True, revision=revision)
            assert caught.value.reason == "revision"
        assert commits(hub, "me/fused") == 1
        zoo.push(folder, "me/fused", create_pr=True)
        (folder / "README.md").write_text(MINE + "Better.")
        zoo.push(folder, "me/fused@refs/pr/1")
        assert {ref: hub.store.repositories["me/fused"].commit_of(ref).oid == commit
                for ref in hub.store.repositories["me/fused"].refs} == {
            "refs/heads/main": True, "refs/tags/v1": True, "refs/pr/1": False}

    def test_licences(self, hub: Hub, tmp_path: Path) -> None:
        def model(*licences: str | None) -> zoo.Model:
            members = [zoo.backbone("mnist_cnn", num_classes=3, seed=1, device="cpu")
                       for _ in licences]
            for number, (member, licence) in enumerate(zip(members, licences, strict=True)):
                told = {"license": licence} if licence else {}
                next(member.each_member()).source.update(repository=f"org/{number}", **told)
            return zoo.fuse(members, "mean")

        def published(made: zoo.Model, **license: str) -> str | None:
            zoo.push(made, "me/fused", exist_ok=True, **license)
            return ModelCard.load("me/fused").data.license

        assert published(model("Apache-2.0", "mit")) == "apache-2.0"
        assert published(model("mit", "CC-BY-NC-4.0", "bsd-3-clause")) == "cc-by-nc-4.0"
        assert published(model("openrail", "openrail")) == "openrail"
        for made, message in [
            (model("mit", None), "the licence of org/1 is unknown"),
            (model("other", "mit"), "is unknown"),
            (model("gpl-3.0", "cc-by-nc-4.0"), "these licences do not go together as far as zoo "
             r"knows: cc-by-nc-4.0 \(org/1\), gpl-3.0 \(org/0\)"),
            (zoo.fuse([model("mit", None), model("mit", "mit")], "concat"), "is unknown"),
        ]:
            with pytest.raises(HubError, match=message + r"\. Look at .* --license") as caught:
                zoo.push(made, "me/fused", exist_ok=True)
            assert caught.value.reason == "licence"
            assert published(made, license="CC-BY-NC-4.0") == "cc-by-nc-4.0"
        with pytest.raises(HubError, match='"license" must be one of'):
            zoo.push(model("mit", "mit"), "me/fused", exist_ok=True, license="mine")

    def test_no_licence_of_a_source_is_lost(self, hub: Hub, tmp_path: Path) -> None:
        """Of a repository that holds a fusion there are those of its members and its own; of one
        that does not say how it was fused, those that its members have."""
        def member(name: str, licence: str) -> zoo.Model:
            made = zoo.backbone("mnist_cnn", num_classes=3, seed=1, device="cpu")
            next(made.each_member()).source.update(repository=name, license=licence)
            return made

        def licence_of(*given: zoo.Model | str) -> str | None:
            out = zoo.save(zoo.fuse(list(given), "mean", device="cpu"), tmp_path / "out")
            told = ModelCard.load(out / "README.md").data
            assert "org/fused" not in told.base_model  # what it was fused from stands there
            return told.license

        inner = zoo.fuse([member("org/a", "mit"), member("org/b", "cc-by-4.0")], "mean")
        folder = zoo.save(inner, tmp_path / "inner")
        card = (folder / "README.md").read_text()
        assert "license: cc-by-4.0\n" in card
        for stated, expected in ((None, "cc-by-4.0"), ("cc-by-nc-4.0", "cc-by-nc-4.0")):
            said = f"license: {stated}\n" if stated else ""
            (folder / "README.md").write_text(card.replace("license: cc-by-4.0\n", said))
            hub.store.seed("org/fused", folder)
            assert licence_of("hf-hub:org/fused", member("org/c", "mit")) == expected
        base = zoo.save(zoo.fuse([member("org/a", "mit"), member("org/b", "mit")],
                                 "task_arithmetic", base=member("org/d", "bsd-3-clause"),
                                 norms="pooled"), tmp_path / "base")
        assert licence_of(zoo.load(base, device="cpu"), member("org/c", "mit")) == "bsd-3-clause"
        config = json.loads((folder / "config.json").read_text())
        for key in ("strategy", "sources"):
            del config["zoo"]["made_with"][key]
        (folder / "config.json").write_text(json.dumps(config))
        assert licence_of(zoo.load(folder, device="cpu"), member("org/c", "mit")) == "cc-by-4.0"

    def test_a_folder_that_says_nothing_of_its_making_needs_a_licence(
        self, hub: Hub, folder: Path
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["zoo"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(HubError, match="does not say what it was made with"):
            zoo.push(folder, "me/fused")
        zoo.push(folder, "me/fused", license="mit")
        assert ModelCard.load("me/fused").data.license == "mit"
        assert "license: mit" not in (folder / "README.md").read_text()


class TestErrors:
    """One clear sentence each, and what to do."""

    def refused(self, folder: Path, name: str = "me/fused", **options: object) -> HubError:
        before = bytes_of(folder)
        with pytest.raises(HubError) as caught:
            zoo.push(folder, name, **options)  # type: ignore[arg-type]
        assert bytes_of(folder) == before
        assert caught.value.repository == name
        assert caught.value.__context__ is None
        return caught.value

    def test_not_logged_in(self, hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        error = self.refused(folder)
        assert str(error) == ("me/fused: nobody is logged in; run `hf auth login`, or set HF_TOKEN "
                              "to a token with the role 'write' from the Hub's settings page")
        assert (error.reason, hub.log) == ("login", [])
        monkeypatch.setenv("HF_TOKEN", "hf_expired00")
        error = self.refused(folder)
        assert error.reason == "login"
        assert "does not accept the login (Invalid credentials" in str(error)

    def test_no_right_to_write(self, hub: Hub, folder: Path, tmp_path: Path) -> None:
        hub.store.seed("org/fused", saved(tmp_path / "other"))
        (folder / "README.md").write_text(MINE)
        for token in (hub.token("me", "read"), hub.token("you")):
            for name in ("org/new", "org/fused"):
                error = self.refused(folder, name, token=token, exist_ok=True)
                assert error.reason == "rights"
                assert "this login may not do that (You don't have the rights" in str(error)
                assert "open a pull request" in str(error)
        assert commits(hub, "org/fused") == 0

    def test_name_taken(self, hub: Hub, folder: Path, me: str) -> None:
        zoo.push(fused(), "me/fused")
        (folder / "README.md").write_text(MINE)
        for dry_run in (False, True):
            error = self.refused(folder, dry_run=dry_run)
            assert (error.reason, error.problem) == (
                "taken", "the repository is there already, with something else in it; choose "
                "another name, say exist_ok=True (--exist-ok) to replace it, or create_pr=True "
                "(--create-pr) to propose it")
        assert commits(hub, "me/fused") == 1
        error = self.refused(folder, private=True, exist_ok=True)
        assert error.reason == "public"
        assert self.refused(folder, "me/none", create_pr=True).reason == "missing"

    def test_gated(self, hub: Hub, folder: Path, me: str, tmp_path: Path) -> None:
        hub.store.seed("you/gated", saved(tmp_path / "other"), gated=True)
        (folder / "README.md").write_text(MINE)
        error = self.refused(folder, "you/gated", create_pr=True)
        assert error.reason == "gated"
        assert "its owner gives access on request; ask on its page" in str(error)

    def test_offline(
        self, hub: Hub, folder: Path, me: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hub.close()
        assert self.refused(folder).problem == (
            "the Hub cannot be reached; check the network, and that HF_HUB_OFFLINE is not set")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert self.refused(folder).reason == "offline"

    def test_an_endpoint_that_is_no_address(
        self, hub: Hub, folder: Path, me: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url.removeprefix("http://"))
        with pytest.raises(HubError, match="HF_ENDPOINT is no address of a Hub") as caught:
            zoo.push(folder, "me/fused", dry_run=True)
        assert caught.value.reason == "offline"

    def test_disk_full(self, hub: Hub, me: str, monkeypatch: pytest.MonkeyPatch) -> None:
        full = shutil._ntuple_diskusage(100, 100, 0)
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: full)
        with pytest.raises(zoo.errors.DiskFull, match="make room"):
            zoo.push(fused(), "me/fused")
        assert hub.store.repositories == {}

    def test_a_hub_without_xet(
        self, hub: Hub, folder: Path, me: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        assert self.refused(folder).problem == (
            "this Hub has no Xet, and the client goes the other way only if it is told; set "
            "HF_HUB_DISABLE_XET=1 and run the same again")
        assert hub.called("xet-token") == 1
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        assert zoo.push(folder, "me/fused").commit

    def test_somebody_else_makes_the_repository_at_the_same_time(
        self, hub: Hub, folder: Path, me: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        other = saved(tmp_path / "other")
        (folder / "README.md").write_text(MINE)
        create = hub.store.create

        def quicker(name: str, *given: object) -> object:
            hub.store.seed(name, other)
            return create(name, *given)  # type: ignore[arg-type]

        monkeypatch.setattr(hub.store, "create", quicker)
        assert self.refused(folder).reason == "taken"
        assert commits(hub, "me/fused") == 0

    def test_somebody_else_pushed_meanwhile(
        self, hub: Hub, folder: Path, me: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        zoo.push(fused(), "me/fused")
        (folder / "README.md").write_text(MINE)
        changed = hub.store.repositories["me/fused"]
        original = type(changed).want_write

        def meanwhile(self: object, caller: object) -> None:
            monkeypatch.undo()
            original(changed, caller)  # type: ignore[arg-type]
            head = changed.commit_of("main")
            hub.store.commit(changed, "refs/heads/main", head, head.files, "theirs")

        with pytest.MonkeyPatch.context() as patch:
            monkeypatch = patch
            patch.setattr(type(changed), "want_write", meanwhile)
            error = self.refused(folder, exist_ok=True)
        assert error.reason == "changed"
        assert "somebody else has pushed to it meanwhile" in str(error)
        assert changed.commit_of("main").title == "theirs"

    def test_names_and_options(self, hub: Hub, folder: Path, me: str) -> None:
        for name, message in [("fused", "a repository on the Hub is 'org/name'"),
                              ("a/b/c", "a Hub address is"), ("me/fused@", "nothing follows"),
                              ("https://huggingface.co/me/fused/tree/main",
                               "write 'hf-hub:me/fused@main'"),
                              ("huggingface.co/me/fused", "write 'hf-hub:me/fused'")]:
            with pytest.raises(BadName, match=message) as caught:
                zoo.push(folder, name)
            assert caught.value.given == name
        nothing: Any = None
        with pytest.raises(BadName, match="None' is not a name: a repository on the Hub is"):
            zoo.push(folder, nothing)
        with pytest.raises(OptionError, match="a pull request goes against main"):
            zoo.push(folder, "me/fused@dev", create_pr=True)
        with pytest.raises(OptionError, match="the revision is both 'dev' and 'x'"):
            zoo.push(folder, "me/fused@dev", revision="x")
        assert hub.log == []


def test_no_token_is_in_anything_that_is_said_or_written(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the client, whatever it logs; not by zoo, even where the Hub's answer has it."""
    planted, given = hub.token("me"), "api-org-0123456789"
    hub.store.callers[given] = hub.store.callers[planted]
    monkeypatch.setenv("HF_TOKEN", planted)
    caplog.set_level(logging.DEBUG)
    said = [str(zoo.push(folder, "me/fused")), repr(zoo.push(folder, "me/fused", dry_run=True))]
    (folder / "README.md").write_text(MINE)
    zoo.push(folder, "me/fused", exist_ok=True, token=given)
    zoo.save(zoo.load("hf-hub:me/fused", device="cpu"), tmp_path / "loaded")
    zoo.pull("me/fused", tmp_path / "pulled")
    said.append(caplog.text)
    assert "/commit/main" in caplog.text
    attempts: list[tuple[str, Callable[[], object]]] = [
        (given, lambda: zoo.push(folder, "me/new", token=given)),
        (planted, lambda: zoo.push(folder, "you/fused")),
        (planted, lambda: zoo.load("hf-hub:you/fused"))]
    (folder / "README.md").write_text(MINE + "Too.")
    for token, attempt in attempts:
        for name in ("create", "repository"):
            monkeypatch.setattr(hub.store, name, echo(token))
        with pytest.raises(zoo.ZooError) as caught:
            attempt()
        said += traceback.format_exception(caught.value)
        said.append(repr(vars(caught.value)))
    for command in (["push", str(folder), "you/fused"], ["pull", "you/fused"]):
        with pytest.raises(SystemExit):
            main(command)
    said += capsys.readouterr()
    assert "hf_…" in "".join(said)
    for token in (planted, given):
        assert token not in "".join(said)
        for file in tmp_path.rglob("*"):
            assert not file.is_file() or token.encode() not in file.read_bytes(), file


def echo(token: str) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise Refused(403, f"The token {token} has no business here")

    return refuse


@pytest.mark.parametrize("token", ["hf_plänted", "hf_€€€€€€"])
def test_a_token_that_cannot_be_sent(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="the token has characters that no token has") as caught:
        zoo.push(folder, "me/fused")
    assert (caught.value.reason, token in str(caught.value)) == ("login", False)


def test_the_command(
    hub: Hub, folder: Path, tmp_path: Path, me: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def zoo_(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 0
        return capsys.readouterr().out

    told = zoo_("push", str(folder), "me/fused", "--private", "--dry-run")
    assert "model.safetensors" in told
    assert "would push" in told
    told = zoo_("push", str(folder), "me/fused", "--private")
    assert f"pushed: {hub.url}/me/fused/commit/" in told
    told = zoo_("push", str(folder), "me/fused", "--dry-run")
    assert "would push 0 bytes to me/fused@main; all of it is there: http" in told
    told = json.loads(zoo_("push", str(folder), "me/fused", "--json"))
    assert (told["uploaded"], told["files"][0]["state"]) == (0, "there")
    pulled = zoo_("pull", "me/fused", "-o", str(tmp_path / "down"))
    assert pulled == f"{tmp_path / 'down'}: me/fused at commit {told['commit']}\n"
    assert json.loads(zoo_("pull", "me/fused", "--json"))["revision"] == told["commit"]


def test_faults_of_the_machine_are_told_apart(hub: Hub) -> None:
    from zoo.store.answers import refusal

    full = RuntimeError("wrapped")
    full.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert refusal(full).reason == "disk"
    assert copy.copy(Fault("commit", "500")).hits(1)
