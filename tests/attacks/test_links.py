"""Pointers to members that lead elsewhere than to weights on the Hub at a commit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hub import Hub

import zoo
from zoo.errors import FormatError, WeightsError
from zoo.tensors import load_tensors, save_tensors

COMMIT = "0" * 40
HASH = "f" * 64


@pytest.fixture
def folder(tmp_path: Path, hub: Hub) -> Path:
    nets = [zoo.backbone("mnist_cnn", num_classes=3, seed=seed, device="cpu") for seed in (1, 2)]
    return zoo.save(zoo.fuse(nets, "mean"), tmp_path / "fused")


def link(**changed: Any) -> dict[str, Any]:
    return {"member": "x", "repository": "org/evil", "revision": COMMIT,
            "sha256": {"model.safetensors": HASH}, "bytes": 1, **changed}


def with_links(folder: Path, links: Any) -> Path:
    file = folder / "config.json"
    told = json.loads(file.read_text())
    told["zoo"].update(links=links, must_understand=["links"])
    file.write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize(("links", "said"), [
    ([], "no mapping of 1 to 64"), ({}, "no mapping of 1 to 64"),
    ({f"members.{number}.net": link() for number in range(65)}, "no mapping of 1 to 64"),
    ({"members.7.net": link()}, "no member of the model"),
    ({"members.0": link()}, "no member of the model"),
    ({"fuser": link()}, "no member of the model"),
    ({"members.0.net.members.0.net": link()}, "no member of the model"),
    ({"members.0.net": "org/evil"}, "no JSON object"),
    *[({"members.0.net": link(repository=name)}, "expected org/name on the Hub")
      for name in ("/etc", "../../x", "evil", "local-dir:/etc", "org/evil@main", "a/b/c", "org/..",
                   "https://evil.example/x", "org/a--b", "a--b/c", "-org/a", None, 3)],
    *[({"members.0.net": link(revision=name)}, "expected a commit of 40 hexadecimal digits")
      for name in ("main", COMMIT[:12], None, "../x", COMMIT + "\n")],
    *[({"members.0.net": link(sha256=files)}, "expected model.safetensors, or its index")
      for files in ({}, None, {"pytorch_model.bin": HASH}, {"../model.safetensors": HASH},
                    {"*": HASH}, {"model-00001-of-00002.safetensors": HASH},
                    {"model.safetensors": HASH, "config.json": HASH},
                    {"model.safetensors": HASH, **{f"model-{n:05}-of-01000.safetensors": HASH
                                                   for n in range(1000)}})],
    *[({"members.0.net": link(sha256={"model.safetensors": hash_})}, "64 hexadecimal digits")
      for hash_ in ("", None, "F" * 64, "../x")],
    ({"members.0.net": link(), "members.1.net": link(sha256={"model.safetensors": "e" * 64})},
     "with different hashes"),
])
def test_no_pointer_is_followed(hub: Hub, folder: Path, links: Any, said: str) -> None:
    with_links(folder, links)
    with pytest.raises(FormatError) as caught:
        zoo.load(folder, device="cpu")
    assert said in str(caught.value)
    assert hub.log == []


def seeded(hub: Hub, folder: Path, change: Callable[[Path], object]) -> dict[str, Any]:
    """A repository with the weights of one member, changed, and a pointer to it."""
    folder.mkdir()
    hashes = save_tensors(zoo.backbone("mnist_cnn", num_classes=3, seed=1, device="cpu")
                          .members[0].net.state_dict(), folder / "model.safetensors")
    change(folder)
    return link(repository="org/evil", revision=hub.store.seed("org/evil", folder), sha256=hashes)


def test_what_is_carried_and_linked(hub: Hub, folder: Path, tmp_path: Path) -> None:
    with_links(folder, {"members.0.net": seeded(hub, tmp_path / "evil", lambda where: None)})
    with pytest.raises(FormatError, match="and links its member elsewhere"):
        zoo.load(folder, device="cpu")


def test_a_pointer_behind_a_pointer(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Of a repository that links itself there are the weights that it carries."""
    middle = tmp_path / "middle"
    middle.mkdir()
    hashes = save_tensors({}, middle / "model.safetensors")
    (middle / "config.json").write_text(json.dumps({"zoo": {"links": {"members.0.net": link()}}}))
    commit = hub.store.seed("org/middle", middle)
    kept = {key: tensor for key, tensor in load_tensors(folder).items()
            if not key.startswith("members.0.")}
    save_tensors(kept, folder / "model.safetensors")
    with_links(folder, {"members.0.net": link(repository="org/middle", revision=commit,
                                              sha256=hashes)})
    with pytest.raises(FormatError, match=f"hf-hub:org/middle@{commit}: is not member x: tensor"):
        zoo.load(folder, device="cpu")
    assert not [each for each in hub.log if "evil" in each[2] or "config.json" in each[2]]


def test_a_pickle_beside_the_weights_stays_there(hub: Hub, folder: Path, tmp_path: Path) -> None:
    told = seeded(hub, tmp_path / "evil",
                  lambda where: (where / "pytorch_model.bin").write_bytes(b"a pickle"))
    kept = {key: tensor for key, tensor in load_tensors(folder).items()
            if not key.startswith("members.0.")}
    save_tensors(kept, folder / "model.safetensors")
    assert zoo.load(with_links(folder, {"members.0.net": told}), device="cpu")
    assert not list((tmp_path / "hf").rglob("*.bin"))


def test_nothing_is_fetched_for_a_model_that_cannot_be_built(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    with_links(folder, {"members.0.net": seeded(hub, tmp_path / "evil", lambda where: None)})
    file = folder / "config.json"
    told = json.loads(file.read_text())
    told["zoo"]["model"]["members"][1]["build"]["num_classes"] = 7
    file.write_text(json.dumps(told))
    with pytest.raises(FormatError, match="has 7 outputs and 3 class names"):
        zoo.load(folder, device="cpu")
    assert hub.log == []


def test_what_is_far_larger_than_the_member_is_not_fetched(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    def grow(where: Path) -> None:
        with (where / "model.safetensors").open("r+b") as file:
            file.truncate(140_000_000)  # a hole: nothing is read before its size is known

    with_links(folder, {"members.0.net": seeded(hub, tmp_path / "evil", grow)})
    hub.store.seed("me/fused", folder)
    for way in (partial(zoo.load, folder, device="cpu"), partial(zoo.pull, "me/fused"),
                partial(zoo.pull, "me/fused", tmp_path / "out")):
        with pytest.raises(WeightsError, match="its files of weights have 140,000,000 bytes, and "
                                               "the model has room for no more than 13"):
            way()
        assert not [each for each in hub.log if "org/evil/resolve" in each[2]]
        assert not (tmp_path / "out").exists()
