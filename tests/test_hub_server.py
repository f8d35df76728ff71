"""The Hub on loopback, as huggingface_hub and the `hf` command see it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub import Fault, Hub
from hub.client import environment
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    hf_hub_download,
    snapshot_download,
)

CARD = "---\nlicense: mit\ntags: [merge]\n---\n# A model\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(Path(folder).rglob("*")) if file.is_file()}


@pytest.mark.parametrize("part", [5 << 20, 1000], ids=["basic", "multipart"])
def test_a_folder_goes_up_and_comes_down_the_same(hub: Hub, folder: Path, part: int) -> None:
    hub.store.part = part
    api = HfApi(token=hub.token("alice"))
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/model")
    done = api.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="First")
    down = snapshot_download("alice/model")
    assert Path(down).name == done.oid
    found = contents(down)
    assert found.pop(".gitattributes")
    assert found == contents(folder)
    assert hub.leaks == []
    assert hub.called("upload") == (part > 1000)
    assert hub.called("part") == (11 if part == 1000 else 0)
    again = api.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="Again")
    assert again.oid == done.oid
    assert hub.called("commit") == 1


def test_a_rate_is_kept_to(hub: Hub, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 2400)
    hub.store.seed("org/model", folder)
    hub.rate = 4e6
    began = time.monotonic()
    found = hf_hub_download("org/model", "model.safetensors")
    assert time.monotonic() - began > 0.15  # 614,400 bytes
    assert Path(found).read_bytes() == (folder / "model.safetensors").read_bytes()


def test_listings_count_what_there_is_page_by_page(hub: Hub, folder: Path) -> None:
    hub.store.page = 2
    hub.store.seed("org/model", folder)
    api = HfApi()
    files = {file.path: file for file in api.list_repo_tree("org/model", recursive=True)}
    assert list(files) == [".gitattributes", "README.md", "config.json", "model.safetensors"]
    assert hub.called("tree") == 2
    assert files["model.safetensors"].lfs.size == 10_240
    [one] = api.get_paths_info("org/model", ["config.json", "nothing"])
    assert (one.path, one.size) == ("config.json", 2)
    told = api.model_info("org/model", files_metadata=True)
    assert {each.rfilename: each.size for each in told.siblings}["config.json"] == 2
    assert hf_hub_download("org/model", "config.json", revision=told.sha).endswith("config.json")


def test_branches_tags_and_pull_requests(hub: Hub, folder: Path) -> None:
    first = hub.store.seed("org/model", folder)
    api = HfApi(token=hub.token("alice", organisations=("org",)))
    api.create_branch("org/model", branch="dev/x")
    api.create_tag("org/model", tag="v1")
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_branch("org/model", branch="dev/x")
    add = [CommitOperationAdd("config.json", b'{"a": 1}')]
    there = api.create_commit("org/model", add, commit_message="x", revision="dev/x")
    reader = HfApi(token=hub.token("bob", "read"))
    asked = reader.create_commit("org/model", [
        CommitOperationAdd("config.json", b'{"a": 2}'), CommitOperationDelete("README.md")],
        commit_message="y", create_pr=True)
    assert asked.pr_revision == "refs/pr/1"
    assert [api.model_info("org/model", revision=name).sha for name in
            ("main", "v1", "dev/x", "refs/pr/1")] == [first, first, there.oid, asked.oid]
    refs = api.list_repo_refs("org/model", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "dev/x"]
    assert api.get_discussion_details("org/model", 1).is_pull_request
    api.merge_pull_request("org/model", 1)
    assert not api.file_exists("org/model", "README.md")


def test_who_may_do_what(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.store.seed("org/open", folder)
    hub.store.seed("org/private", folder, private=True)
    hub.store.seed("org/gated", folder, gated=True)
    owner = HfApi(token=hub.token("alice", organisations=("org",)))
    reader = HfApi(token=hub.token("alice", "read", ("org",)))
    stranger, nobody = HfApi(token=hub.token("bob")), HfApi(token=False)
    for number, (api, name, refusal) in enumerate([
        (owner, "private", None), (reader, "private", None), (owner, "gated", None),
        (nobody, "open", None), (stranger, "private", errors.RepositoryNotFoundError),
        (nobody, "private", errors.RepositoryNotFoundError),
        (stranger, "gated", errors.GatedRepoError), (nobody, "gated", errors.GatedRepoError),
    ]):
        with pytest.raises(refusal) if refusal else contextlib.nullcontext():
            api.hf_hub_download(f"org/{name}", "config.json", cache_dir=tmp_path / str(number))
    hub.store.repositories["org/gated"].allowed.add("bob")
    assert stranger.hf_hub_download("org/gated", "model.safetensors")
    for api in (reader, stranger):
        with pytest.raises(errors.HfHubHTTPError, match="403"):
            api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/open")
        with pytest.raises(errors.HfHubHTTPError, match="403"):
            api.create_repo("org/new")
    with pytest.raises(errors.HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()
    with pytest.raises(ValueError, match='"license" must be one of'):
        owner.upload_file(path_or_fileobj=b"---\nlicense: mine\n---\n", path_in_repo="README.md",
                          repo_id="org/open")
    owner.delete_repo("org/open")
    with pytest.raises(errors.RepositoryNotFoundError):
        owner.model_info("org/open")


def test_a_commit_on_top_of_another_parent_is_refused_whole(hub: Hub, folder: Path) -> None:
    first = hub.store.seed("alice/model", folder)
    api = HfApi(token=hub.token("alice"))
    api.create_commit("alice/model", [CommitOperationAdd("config.json", b"1")],
                      commit_message="one", parent_commit=first)
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.create_commit("alice/model", [CommitOperationAdd("config.json", b"2")],
                          commit_message="two", parent_commit=first)
    for path in ("../config.json", ".git/config", "/config.json"):
        add = CommitOperationAdd("x", b"1")
        add.path_in_repo = path
        with pytest.raises(errors.BadRequestError, match="Invalid path"):
            api.create_commit("alice/model", [add], commit_message="three")
    assert len(hub.store.repositories["alice/model"].commits) == 2


def test_the_hf_command_and_the_cache_without_a_network(hub: Hub, folder: Path,
                                                       tmp_path: Path) -> None:
    hf = str(Path(sys.executable).with_name("hf"))
    told = environment(hub, tmp_path / "home", hub.token("alice"))
    for command in (("upload", "alice/model", str(folder)),
                    ("download", "alice/model", "--local-dir", str(tmp_path / "down"))):
        subprocess.run([hf, *command], env=told, check=True, capture_output=True)
    assert contents(folder).items() <= contents(tmp_path / "down").items()


def test_what_is_in_the_cache_is_had_offline(hub: Hub, folder: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    hub.store.seed("org/model", folder)
    down = snapshot_download("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert snapshot_download("org/model") == down
    with pytest.raises(errors.LocalEntryNotFoundError):
        snapshot_download("org/other")


@pytest.mark.parametrize("fault", [
    Fault("resolve", "429"), Fault("resolve", "500", nth=2), Fault("resolve", "503"),
    Fault("resolve", "drop", nth=3), Fault("blob", "truncate"), Fault("blob", "slow"),
    Fault("blob", "drop"), Fault("blob", "503"),
], ids=str)
def test_faults_happen_when_they_are_asked_for(hub: Hub, folder: Path, fault: Fault) -> None:
    """The client's own second attempts do for one fault of these."""
    hub.store.seed("org/model", folder)
    hub.fail(fault)
    try:
        down = contents(snapshot_download("org/model", max_workers=1))
    except Exception:  # some reach the caller as they are
        down = contents(snapshot_download("org/model", max_workers=1))
    assert hub.faults.happened == [fault]
    assert contents(folder).items() <= down.items()
