"""Members that stay in repositories of their own, and models that only point to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from huggingface_hub import ModelCard, constants
from torch import Tensor

import zoo
from zoo.cli import main
from zoo.datasets import load_data
from zoo.errors import FormatError, HubError, WeightsError
from zoo.tensors import load_tensors, save_tensors

NAMES = ("a", "b")


def net(seed: int) -> zoo.Model:
    return zoo.backbone("test_vit", num_classes=3, image_size=32, seed=seed, device="cpu")


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def answer(model: zoo.Model) -> Tensor:
    with torch.no_grad():
        return model(images())


@pytest.fixture
def commits(hub: Hub, tmp_path: Path) -> list[str]:
    """Two networks on the Hub, org/a and org/b."""
    return [hub.store.seed(f"org/{name}", zoo.save(net(seed), tmp_path / name))
            for seed, name in enumerate(NAMES)]


def fuse(strategy: str = "mean", names: tuple[str, ...] = NAMES) -> zoo.Model:
    return zoo.fuse([f"hf-hub:org/{name}" for name in names], strategy, device="cpu")


@pytest.fixture
def linked(commits: list[str], tmp_path: Path) -> Path:
    return zoo.save(fuse(), tmp_path / "linked", link_members=True)


def config_of(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["zoo"]


def changed(folder: Path, change: Callable[[Any], object]) -> Path:
    told = json.loads((folder / "config.json").read_text())
    change(told["zoo"])
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def forget(tmp_path: Path) -> None:
    """An empty cache."""
    shutil.rmtree(tmp_path / "hf")


@pytest.mark.parametrize("strategy", ["mean", "concat"])
def test_a_small_folder_answers_as_the_large_one(
    hub: Hub, commits: list[str], tmp_path: Path, strategy: str
) -> None:
    model = fuse(strategy)
    whole = zoo.save(model, tmp_path / "whole")
    small = zoo.save(model, tmp_path / "small", link_members=True)
    config = config_of(small)
    assert "links" not in config_of(whole)
    assert config["must_understand"] == ["links"]
    assert {path: (link["repository"], link["revision"]) for path, link in
            config["links"].items()} == {
        f"members.{number}.net": (f"org/{name}", commits[number])
        for number, name in enumerate(NAMES)}
    assert (small / "model.safetensors").stat().st_size * 50 < (
        whole / "model.safetensors").stat().st_size
    forget(tmp_path)
    before = hub.called("blob")
    again = zoo.load(small, device="cpu")
    assert hub.called("blob") - before == 2
    assert torch.equal(answer(again), answer(zoo.load(whole, device="cpu")))
    assert [member.source["revision"] for member in again.each_member()] == commits
    assert config_of(zoo.save(again, tmp_path / "again", link_members=True)) == config
    assert set(load_tensors(zoo.save(again, tmp_path / "carried"))) == set(load_tensors(whole))


def test_a_repository_that_two_members_point_to_is_fetched_once(
    hub: Hub, commits: list[str], tmp_path: Path
) -> None:
    out = zoo.save(fuse(names=("a", "a")), tmp_path / "twice", link_members=True)
    forget(tmp_path)
    before = hub.called("blob"), hub.called("resolve")
    model = zoo.load(out, device="cpu")
    assert (hub.called("blob"), hub.called("resolve")) == (before[0] + 1, before[1] + 1)
    one, other = (next(member.parameters()) for member in model.each_member())
    with torch.no_grad():
        one.zero_()
    assert other.any()  # they are two networks


def test_pull_brings_the_members_for_later_without_a_network(
    hub: Hub, linked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(zoo.load(linked, device="cpu"))
    commit = hub.store.seed("me/fused", linked)
    forget(tmp_path)
    out = zoo.pull("me/fused", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for place in (out, "hf-hub:me/fused"):
            model = zoo.load(place, device="cpu")
            assert torch.equal(answer(model), expected)
            assert [member.source["repository"] for member in model.each_member()] == [
                "org/a", "org/b"]
        forget(tmp_path)
        with pytest.raises(WeightsError) as caught:
            zoo.load(out, device="cpu")
    assert "of me/fused lies in another repository: hf-hub:org/" in str(caught.value)
    assert str(caught.value).endswith(
        "the Hub cannot be reached and it is not in the cache; load it once while online")
    assert commit


def test_a_member_of_a_plugin_that_is_missing_is_not_pulled(
    hub: Hub, linked: Path, tmp_path: Path
) -> None:
    """How large it may be is not known then."""
    changed(linked, lambda ours: ours.update(
        requires=[{"namespace": "acme", "requirement": "fusion-zoo-acme>=1"}]))
    hub.store.seed("me/fused", linked)
    forget(tmp_path)
    before = len(hub.log)
    with pytest.warns(UserWarning, match=r"members of me/fused@\w{40} lie in other repositories, "
                                         r"and are fetched once it can be loaded: .*acme"):
        folder = zoo.pull("me/fused", tmp_path / "out")
    assert (folder / "model.safetensors").is_file()
    assert not [each for each in hub.log[before:] if "org/" in each[2]]


def test_a_recipe_that_links_members(hub: Hub, tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        model = zoo.backbone("mnist_cnn", num_classes=10, image_size=8, seed=seed, device="cpu")
        hub.store.seed(f"org/{name}", zoo.save(model, tmp_path / name))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("""
        data: {target: {train: {data: digits, limit: 60}, test: {data: digits, limit: 40}}}
        source: {backbone: hf-hub:org/a, transfer: {method: linear_probe, epochs: 1}}
        target: {backbone: mnist_cnn, image_size: 8, transfer: {epochs: 1}}
        fuse: {strategy: concat, members: ["hf-hub:org/a", "hf-hub:org/b", target]}
        link_members: true
        """)
    with pytest.warns(UserWarning, match="not linked, and carried: zoo/mnist_cnn .no repository"):
        done = zoo.run(recipe, tmp_path / "run", device="cpu")
    links = config_of(done.out / "fused")["links"]
    assert {path: link["repository"] for path, link in links.items()} == {
        "members.0.net": "org/a", "members.1.net": "org/b"}
    assert not [key for key in load_tensors(done.out / "fused")
                if key.startswith(("members.0.", "members.1."))]
    forget(tmp_path)
    again = zoo.load(done.out / "fused", device="cpu")
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(pixels), done.model(pixels))
    with pytest.raises(SystemExit) as ended, pytest.warns(UserWarning, match="not linked"):
        main(["run", str(recipe), "-o", str(tmp_path / "run"), "--device", "cpu"])
    assert not ended.value.code
    assert config_of(done.out / "fused")["links"] == links


def test_a_file_that_changed_under_its_commit(
    hub: Hub, linked: Path, commits: list[str], tmp_path: Path
) -> None:
    forget(tmp_path)
    other = zoo.save(net(9), tmp_path / "other")
    hub.store.seed("org/x", other)
    files: Any = hub.store.repositories["org/a"].commits[commits[0]].files
    swapped = hub.store.repositories["org/x"].commit_of("main").files
    was = files["model.safetensors"].sha256
    files.update(swapped)
    with pytest.raises(WeightsError) as caught:
        zoo.load(linked, device="cpu")
    message = str(caught.value)
    assert f"member timm/test_vit.r160_in1k of {linked} lies in another repository" in message
    assert f"model.safetensors in hf-hub:org/a@{commits[0]} is not what it was when" in message
    now = files["model.safetensors"].sha256
    assert f"expected sha256 {str(was)[:12]}…, found {str(now)[:12]}…" in message


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda hub: setattr(hub.store.repositories["org/b"], "gated", True),
     "its owner gives access on request"),
    (lambda hub: hub.store.repositories.pop("org/b"), "the Hub has no such repository"),
])
def test_a_member_that_cannot_be_had(
    hub: Hub, linked: Path, tmp_path: Path, spoil: Callable[[Hub], None], said: str
) -> None:
    forget(tmp_path)
    spoil(hub)
    with pytest.raises(WeightsError) as caught:
        zoo.load(linked, device="cpu")
    assert str(caught.value).startswith(f"member timm/test_vit.r160_in1k of {linked} lies in "
                                        "another repository: hf-hub:org/b@")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_trained_or_made_here_is_carried(commits: list[str], tmp_path: Path) -> None:
    trained = zoo.load("hf-hub:org/b", device="cpu")
    zoo.transfer(trained, load_data("digits", role="train").take(40), "linear_probe", epochs=1)
    model = zoo.fuse(["hf-hub:org/a", trained, net(5)], "mean", device="cpu")
    with pytest.warns(UserWarning, match=r"not linked, and carried: .*\(its weights are not those "
                                         r"of org/b: it was trained.*no repository") as told:
        out = zoo.save(model, tmp_path / "mixed", link_members=True)
    assert len(told) == 1
    assert list(config_of(out)["links"]) == ["members.0.net"]
    again = zoo.load(out, device="cpu")
    assert torch.equal(answer(again), answer(model))
    with pytest.warns(UserWarning, match="it is one network"):
        assert "links" not in config_of(zoo.save(net(1), tmp_path / "one", link_members=True))


def test_a_trained_head_over_frozen_members(commits: list[str], tmp_path: Path) -> None:
    model = fuse("concat")
    zoo.transfer(model, load_data("digits", role="train").take(40), "linear_probe", epochs=1)
    out = zoo.save(model, tmp_path / "probed", link_members=True)
    assert {key.partition(".")[0] for key in load_tensors(out)} == {"fuser", "head"}
    assert torch.equal(answer(zoo.load(out, device="cpu")), answer(model))


def test_a_member_in_shards(hub: Hub, tmp_path: Path) -> None:
    member = zoo.fuse([net(1), net(2)], "mean")
    hub.store.seed("org/large", zoo.save(member, tmp_path / "large", max_shard_bytes=400_000))
    model = zoo.fuse(["hf-hub:org/large", net(3)], "mean", device="cpu")
    with pytest.warns(UserWarning, match="no repository and commit are known of it"):
        out = zoo.save(model, tmp_path / "out", link_members=True)
    (link,) = config_of(out)["links"].values()
    assert len(link["sha256"]) >= 3
    assert "model.safetensors.index.json" in link["sha256"]
    forget(tmp_path)
    assert torch.equal(answer(zoo.load(out, device="cpu")), answer(model))


def test_from_the_command_line(commits: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fuse", "hf-hub:org/a", "hf-hub:org/b", "--with", "vote", "--link-members",
              "--device", "cpu", "-o", str(tmp_path / "out")])
    assert not ended.value.code
    assert [link["revision"] for link in config_of(tmp_path / "out")["links"].values()] == commits


def test_a_fusion_inside_of_a_fusion(hub: Hub, commits: list[str], tmp_path: Path) -> None:
    """One that is carried on the Hub is pointed to as a whole, the members of one that is linked
    each where they are: no pointer leads to a pointer."""
    for name, link in (("whole", False), ("small", True)):
        hub.store.seed(f"me/{name}", zoo.save(fuse(), tmp_path / name, link_members=link))
    model = fuse(names=("a",) * 2)
    outer = zoo.fuse(["hf-hub:me/whole", "hf-hub:me/small", model], "mean", device="cpu")
    out = zoo.save(outer, tmp_path / "outer", link_members=True)
    assert {path: link["repository"] for path, link in config_of(out)["links"].items()} == {
        "members.0.net": "me/whole", "members.1.net.members.0.net": "org/a",
        "members.1.net.members.1.net": "org/b", "members.2.net.members.0.net": "org/a",
        "members.2.net.members.1.net": "org/a"}
    forget(tmp_path)
    assert torch.equal(answer(zoo.load(out, device="cpu")), answer(outer))


def test_tables_that_only_the_weights_elsewhere_are_worth(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = zoo.backbone("test_vit", num_classes=3, image_size=544, seed=1, device="cpu")
    hub.store.seed("org/a", zoo.save(large, tmp_path / "a"))
    model = fuse(names=("a", "a"))
    out = zoo.save(model, tmp_path / "linked", link_members=True)
    forget(tmp_path)
    monkeypatch.setattr("zoo.store.rebuilding._FREE_BYTES", -100_000)
    again = zoo.load(out, device="cpu").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    forget(tmp_path)
    monkeypatch.setattr("zoo.store.rebuilding._FREE_BYTES", -10**9)
    with pytest.raises(FormatError, match="no network that anybody trained"):
        zoo.load(out, device="cpu")


class TestPush:
    @pytest.fixture(autouse=True)
    def me(self, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", hub.token("me"))

    def test_a_dry_run_shows_what_stays(
        self, commits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole = zoo.save(fuse(), tmp_path / "whole")
        plain = zoo.push(whole, "me/fused", dry_run=True, license="mit")
        told = zoo.push(whole, "me/fused", link_members=True, dry_run=True, license="mit")
        assert told.linked == tuple(f"hf-hub:org/{name}@{commit}"
                                    for name, commit in zip(NAMES, commits, strict=True))
        assert plain.linked == ()
        assert told.left_out == sum(t.nbytes for t in load_tensors(whole).values())
        assert told.uploaded < plain.uploaded - told.left_out + 10_000
        with pytest.raises(SystemExit):
            main(["push", str(whole), "me/fused", "--link-members", "--dry-run",
                  "--license", "mit"])
        assert f"not pushed: {told.left_out:,} bytes of members that stay in hf-hub:org/a@" in (
            capsys.readouterr().out)

    def test_pushed_loaded_shown_and_made_again(
        self, hub: Hub, commits: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = fuse()
        done = zoo.push(model, "me/fused", link_members=True, license="mit")
        forget(tmp_path)
        assert torch.equal(answer(zoo.load(f"hf-hub:me/fused@{done.commit}", device="cpu")),
                           answer(model))
        assert zoo.reproduce("me/fused").reproduced
        folder = zoo.pull("me/fused", tmp_path / "out")
        card = ModelCard.load(folder / "README.md")
        assert card.data.base_model == ["org/a", "org/b"]
        assert f"`org/a` | `{commits[0]}`" in card.text
        with pytest.raises(SystemExit):
            main(["show", str(folder)])
        assert f"is not in this folder; its {done.left_out // 2:,} bytes are in " \
            f"hf-hub:org/a@{commits[0]}" in capsys.readouterr().out
        again = zoo.push(folder, "me/fused", license="mit")
        assert (again.commit, again.linked) == (done.commit, done.linked)
        with pytest.raises(FormatError, match="has only a part of its weights"):
            zoo.merge([folder, folder], "average", out=tmp_path / "merged")

    @pytest.mark.parametrize(("spoil", "said"), [
        (lambda one: setattr(one, "private", True),
         "org/a is gone, or this login does not see it, so that nobody else can load this model"),
        (lambda one: setattr(one, "gated", True), "org/a is gated, so that only those to whom its "
         "owner gives access can load this model"),
        (lambda one: one.commits.clear(), "any more, so that nobody else can load this model"),
    ])
    def test_members_that_others_cannot_read_stop_it(
        self, hub: Hub, linked: Path, spoil: Callable[[Any], object], said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        spoil(hub.store.repositories["org/a"])
        [sentence] = zoo.push(linked, "me/fused", dry_run=True, license="mit").closed
        assert said in sentence
        with pytest.raises(HubError) as caught:
            zoo.push(linked, "me/fused", license="mit")
        assert caught.value.reason == "members"
        assert str(caught.value) == (
            f"me/fused: {sentence}. Carry its members instead (without link_members; of a folder, "
            "zoo.save(zoo.load(folder), out)), or say closed_members=True (--closed-members)")
        assert "me/fused" not in hub.store.repositories
        with pytest.raises(SystemExit) as ended:
            main(["push", str(linked), "me/fused", "--license", "mit", "--closed-members"])
        assert not ended.value.code
        assert said in capsys.readouterr().err
        assert "me/fused" in hub.store.repositories

    def test_private_members_have_the_readers_of_what_is_private_beside_them(
        self, hub: Hub, commits: list[str], tmp_path: Path
    ) -> None:
        hub.store.seed("me/own", tmp_path / "a", private=True)
        model = zoo.fuse(["hf-hub:me/own", "hf-hub:org/b"], "mean", device="cpu")
        folder = zoo.save(model, tmp_path / "mine", link_members=True)
        with pytest.raises(HubError, match="me/own is private, so that only those who may read it "
                                           "can load this model"):
            zoo.push(folder, "me/fused", license="mit", private=False)
        told = zoo.push(folder, "me/fused", license="mit", private=True)
        assert told.closed == ()
        assert told.commit

    @pytest.mark.parametrize("more", ["\n## Measured\n\nwell\n", "\nNot for medical use.\n"])
    def test_nothing_of_a_card_is_lost(
        self, commits: list[str], tmp_path: Path, more: str
    ) -> None:
        folder = zoo.save(fuse(), tmp_path / "whole")
        card = folder / "README.md"
        card.write_text(card.read_text() + more)
        with pytest.raises(HubError, match=r"the card of .* has figures or was edited, which wou"):
            zoo.push(folder, "me/fused", link_members=True, license="mit")

    def test_a_folder_that_carries_its_members_loses_only_these(
        self, hub: Hub, commits: list[str], tmp_path: Path
    ) -> None:
        """Licences go along, as do the shards; what may not be pushed is found in it."""
        model = zoo.fuse(["hf-hub:org/a", net(5)], "mean", device="cpu")
        folder = zoo.save(model, tmp_path / "whole", max_shard_bytes=400_000)
        for name in ("LICENSE", "NOTICE.md"):
            (folder / name).write_text(f"the {name}")
        with pytest.warns(UserWarning, match="not linked, and carried"):
            zoo.push(folder, "me/fused", link_members=True, license="mit")
        files = {path: blob.size for path, blob in
                 hub.store.repositories["me/fused"].commit_of("main").files.items()}
        assert files["LICENSE"] == 11
        assert files["NOTICE.md"] == 13
        assert "model.safetensors" not in files
        assert "model.safetensors.index.json" in files
        pulled = zoo.pull("me/fused", tmp_path / "pulled")
        assert torch.equal(answer(zoo.load(pulled, device="cpu")), answer(model))
        for name, said in (("weights.bin", "is a pickle"), ("notes.txt", "belongs to no model")):
            (folder / name).write_text("x")
            with pytest.raises(HubError, match=f"{name} in {folder} {said}"):
                zoo.push(folder, "me/other", link_members=True, license="mit")
            (folder / name).unlink()

    def test_a_folder_that_was_pulled_is_linked_too(
        self, commits: list[str], tmp_path: Path
    ) -> None:
        zoo.push(fuse(), "me/whole", license="mit")
        folder = zoo.pull("me/whole", tmp_path / "whole")
        done = zoo.push(folder, "me/fused", link_members=True, license="apache-2.0")
        assert len(done.linked) == 2


@pytest.mark.parametrize("size", ["9", None, -1, 1e9, True, [1]])
def test_showing_links_whose_size_is_none(
    linked: Path, capsys: pytest.CaptureFixture[str], size: Any
) -> None:
    changed(linked, lambda ours: ours["links"]["members.0.net"].update(bytes=size))
    changed(linked, lambda ours: ours["links"]["members.1.net"].pop("bytes"))
    with pytest.raises(SystemExit) as ended:
        main(["show", str(linked)])
    assert not ended.value.code
    assert capsys.readouterr().out.count("is not in this folder; its weights are in hf-hub:org/") \
        == 2


def test_a_repository_of_other_shapes(hub: Hub, linked: Path, tmp_path: Path) -> None:
    other = zoo.save(net(3), tmp_path / "other")
    tensors = load_tensors(other)
    for key, said in (("head.bias", "is [4], expected [3]"), ("head.weight", "is missing")):
        kept = {**tensors, "head.bias": torch.zeros(4)} if key == "head.bias" else {
            name: tensor for name, tensor in tensors.items() if name != key}
        hashes = save_tensors(kept, tmp_path / "model.safetensors")
        folder = tmp_path / key
        folder.mkdir()
        shutil.copy(tmp_path / "model.safetensors", folder)
        commit = hub.store.seed("org/evil", folder)
        changed(linked, lambda ours, hashes=hashes, commit=commit: ours["links"][
            "members.1.net"].update(repository="org/evil", revision=commit, sha256=hashes))
        with pytest.raises(FormatError) as caught:
            zoo.load(linked, device="cpu")
        assert f"hf-hub:org/evil@{commit}: is not member timm/test_vit.r160_in1k: tensor {key!r} " \
            f"{said}" in str(caught.value)
