"""Folders that point somewhere else: links, and names of files in what they say of themselves."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hub import Hub
from small_models import saved

import zoo
from zoo.errors import FormatError, HubError, ProvenanceError, RecipeError, ZooError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.txt"
    file.write_text("the secret")
    return file


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "confusion.png", "extra.safetensors"])
def test_a_link_is_not_published(
    hub: Hub, tmp_path: Path, secret: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    folder = saved(tmp_path / "fused")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(HubError, match=f"{name} in .* is a link to something outside of it"):
        zoo.push(folder, "me/fused")
    assert hub.store.repositories == {}


def test_what_was_pulled_into_the_cache_is_links_and_may_be_pushed(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    hub.store.seed("org/name", saved(tmp_path / "fused"))
    assert zoo.push(zoo.pull("org/name"), "me/copy").commit


def test_a_link_is_not_copied_into_what_is_merged(tmp_path: Path, secret: Path) -> None:
    folder = saved(tmp_path / "fused")
    (folder / "vocab.txt").symlink_to(secret)
    (folder / "merges.txt").write_text("kept")
    out = zoo.merge([folder, folder], "average", out=tmp_path / "out")
    assert (out / "merges.txt").read_text() == "kept"
    assert not (out / "vocab.txt").exists()


def test_a_pickle_under_another_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "fused")
    for data in (pickle.dumps({"a": 1}, protocol=2), pickle.dumps(list(range(9)), protocol=4)):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(FormatError, match=r"a pickle under another name.*zoo convert"):
            zoo.load(folder, device="cpu")
    torch.save({"a": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(FormatError, match="a pickle under another name"):
        zoo.merge([folder, folder], "average", out=tmp_path / "out")


def test_hashes_of_files_elsewhere_are_not_taken(hub: Hub, tmp_path: Path, secret: Path) -> None:
    """Names in `made_with.sha256` are names beside it."""
    folder = saved(tmp_path / "fused")
    config = json.loads((folder / "config.json").read_text())
    config["zoo"]["made_with"]["sha256"] |= {"../../secret.txt": "0", str(secret): "0"}
    (folder / "config.json").write_text(json.dumps(config))
    hub.store.seed("org/name", folder)
    assert zoo.load("hf-hub:org/name", device="cpu")


@pytest.mark.parametrize("name", ["../a", "/etc", "./evil", "hf-hub:evil/net", "evil:run", ""])
def test_provenance_names_no_paths(tmp_path: Path, name: str) -> None:
    """What a file says of its sources is a registered name or a commit, and no path here."""
    folder = saved(tmp_path / "fused")
    config = json.loads((folder / "config.json").read_text())
    made = config["zoo"]["made_with"]
    made["sources"] = [{"name": name, "package": "x", "repository": "../../x", "revision": "main"}
                       for _ in range(2)]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProvenanceError, match="says nothing of where its weights are published"):
        zoo.reproduce(folder)
    made["strategy"] = "evil:run"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError):
        zoo.reproduce(folder)


@pytest.mark.parametrize("place", ["../outside", "/outside", "a/../../outside"])
def test_a_recipe_saves_inside_its_folder(tmp_path: Path, place: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  target: {train: zoo/digits}\nsource: {backbone: zoo/mnist_cnn}\n"
        "target: {backbone: zoo/mnist_cnn, transfer: {method: finetune, epochs: 1}}\n"
        f"fuse: {{strategy: concat}}\nsave: {place}\n")
    with pytest.raises(RecipeError, match="save"):
        zoo.run(recipe, tmp_path / "run")
    assert not (tmp_path / "outside").exists()
