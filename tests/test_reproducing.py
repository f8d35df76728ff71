"""A saved model is made again from what it says of itself, and compared tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub

import zoo
from zoo.cli import main
from zoo.datasets import ImageData, load_data
from zoo.errors import FormatError, ProvenanceError, WeightsError, ZooError
from zoo.reproducing.comparing import compared
from zoo.tensors import load_tensors, save_tensors

pytestmark = pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")


def net(seed: int, name: str = "test_vit") -> zoo.Model:
    torch.manual_seed(seed)  # a seed of its own would say how to make it again
    return zoo.backbone(name, num_classes=3, image_size=32, device="cpu")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two networks that nobody published."""
    return [zoo.save(net(seed), tmp_path / name) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture
def published(hub: Hub, folders: list[Path]) -> list[str]:
    for folder in folders:
        hub.store.seed(f"org/{folder.name}", folder)
    return [f"hf-hub:org/{folder.name}" for folder in folders]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("digits", role="train").take(60)


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["zoo"]["made_with"])
    file.write_text(json.dumps(config))


def refused(folder: Path | str, **given: Any) -> str:
    with pytest.raises(ProvenanceError) as caught:
        zoo.reproduce(folder, **given)
    assert caught.value.reference == str(folder)
    return str(caught.value)


class TestFromTheHub:
    @pytest.mark.parametrize(("strategy", "options"), [
        ("average", {"weight": {"blocks.*": [0.3, 0.7], "*": 1.0}}),
        ("ties", {"density": 0.3}), ("dare_linear", {"density": 0.5, "seed": 7}),
        ("slerp", {"weight": [0.3, 0.7], "dtype": "bfloat16"}),
    ])
    def test_a_fusion_of_weights_comes_out_bit_for_bit(
        self, hub: Hub, published: list[str], folders: list[Path], tmp_path: Path,
        strategy: str, options: dict[str, Any],
    ) -> None:
        base = {"base": published[0]} if strategy in ("ties", "dare_linear") else {}
        zoo.save(zoo.fuse(published, strategy, **base, **options), tmp_path / "fused")
        hub.store.seed("me/fused", tmp_path / "fused")
        # The sources move on; their commits stay.
        repositories = {name: dict(repository.commits)
                        for name, repository in hub.store.repositories.items()}
        for folder in folders:
            save_tensors({key: tensor + 1 for key, tensor in load_tensors(folder).items()},
                         folder / "model.safetensors")
            hub.store.seed(f"org/{folder.name}", folder)
            hub.store.repositories[f"org/{folder.name}"].commits.update(
                repositories[f"org/{folder.name}"])
        done = zoo.reproduce("me/fused")
        assert done.reproduced, done
        assert (done.exact, done.close, done.tolerance) == (
            len(load_tensors(tmp_path / "fused")), 0, 0.0)
        assert not done.versions
        assert not done.notes

    def test_a_fusion_of_fusions(self, published: list[str], tmp_path: Path) -> None:
        inner = zoo.fuse(published, "average", weight=[0.2, 0.8])
        zoo.save(zoo.fuse([inner, published[0]], "average"), tmp_path / "outer")
        assert zoo.reproduce(tmp_path / "outer").reproduced
        zoo.save(zoo.fuse([inner, published[1]], "mean"), tmp_path / "mean")
        assert zoo.reproduce(tmp_path / "mean").reproduced
        rewrite(tmp_path / "outer", lambda made: made["sources"][0]["recipe"].update(seed="x"))
        with pytest.raises(FormatError, match="its provenance is damaged"):
            zoo.reproduce(tmp_path / "outer")

    def test_merged_files(self, published: list[str], tmp_path: Path) -> None:
        zoo.merge(published, "average", out=tmp_path / "merged", weight=[1, 3], dtype="bfloat16",
                  rounding="stochastic", seed=4)
        assert zoo.reproduce(tmp_path / "merged").reproduced
        zoo.merge(published, "ties", base=published[0], density=0.4, out=tmp_path / "m.safetensors")
        assert zoo.reproduce(tmp_path / "m.safetensors").reproduced

    def test_a_network_that_was_only_copied(self, published: list[str], tmp_path: Path) -> None:
        zoo.save(zoo.load(published[0], device="cpu"), tmp_path / "copy")
        assert zoo.reproduce(tmp_path / "copy").reproduced

    def test_a_source_that_is_gone(self, hub: Hub, published: list[str], tmp_path: Path) -> None:
        zoo.save(zoo.fuse(published, "average"), tmp_path / "fused")
        del hub.store.repositories["org/b"]
        shutil.rmtree(tmp_path / "hf")
        message = refused(tmp_path / "fused")
        assert "its source 2 (timm/test_vit.r160_in1k) cannot be had: hf-hub:org/b@" in message
        assert "say where: --source 2=PATH" in message
        assert zoo.reproduce(tmp_path / "fused", sources={"2": tmp_path / "b"}).reproduced
        with pytest.raises(WeightsError, match="the Hub has no such repository"):
            zoo.reproduce("org/nothing")


class TestFromFolders:
    def test_sources_that_are_not_published_are_given(
        self, folders: list[Path], tmp_path: Path
    ) -> None:
        a, b = folders
        out = zoo.save(zoo.fuse(folders, "ties", base=a), tmp_path / "fused")
        assert "its source 1 (timm/test_vit.r160_in1k) says nothing of where its weights are " \
            "published; if you have it, say where: --source 1=PATH" in refused(out)
        assert zoo.reproduce(out, sources={"1": a, "2": str(b), "base": a}).reproduced
        assert "b is not its source 1" in refused(out, sources={"1": b, "2": b, "base": a})
        assert "it has no source 'bace'; did you mean 'base'?" in refused(
            out, sources={"1": a, "2": b, "base": a, "bace": a})
        with pytest.raises(FormatError, match="there is no such folder"):
            zoo.reproduce(out, sources={"1": tmp_path / "gone", "2": b, "base": a})

    def test_a_member_that_was_trained_here(
        self, published: list[str], digits: ImageData, tmp_path: Path
    ) -> None:
        members = [zoo.load(each, device="cpu") for each in published]
        zoo.transfer(members[1], digits, "linear_probe", epochs=1)
        zoo.transfer(members[0], digits, "linear_probe", epochs=1)
        out = zoo.save(zoo.fuse(members, "average"), tmp_path / "fused")
        message = refused(out)
        assert "was trained by zoo/linear_probe before it was fused, and its weights are not " \
            "published" in message

    def test_what_differs_is_said(self, folders: list[Path], tmp_path: Path) -> None:
        out = zoo.save(zoo.fuse(folders, "average"), tmp_path / "fused")
        state = {key: tensor.clone() for key, tensor in load_tensors(out).items()}
        state["norm.weight"][3] += 0.25
        save_tensors(state, out / "model.safetensors")
        rewrite(out, lambda made: made["versions"].update(torch="1.2.3"))
        done = zoo.reproduce(out, sources={"1": folders[0], "2": folders[1]}, tolerance=0.9)
        assert not done.reproduced
        [difference] = done.differing
        assert difference.tensor == "norm.weight"
        assert difference.largest == pytest.approx(0.25)
        assert difference.saved != difference.found
        assert done.exact == len(state) - 1
        assert done.versions["torch"][0] == "1.2.3"
        assert list(done.versions) == ["torch"]

    def test_provenance_that_does_not_suffice(self, folders: list[Path], tmp_path: Path) -> None:
        def without(config: Any) -> None:
            for each in config["sources"]:
                each.update(repository="org/a", revision="main")

        out = zoo.save(zoo.fuse(folders, "average"), tmp_path / "fused")
        rewrite(out, without)  # a branch moves, and no commit is recorded
        assert "says nothing of where" in refused(out)
        rewrite(out, lambda made: made.update(sources=3))
        with pytest.raises(FormatError, match="its provenance is damaged"):
            zoo.reproduce(out)
        rewrite(out, lambda made: made.clear())
        assert "says nothing of how it was made" in refused(out)
        with pytest.raises(ZooError, match=r"tolerance is 2, expected a share in \[0, 1\)"):
            zoo.reproduce(out, tolerance=2)
        merged = zoo.merge(folders, "average", out=tmp_path / "merged", hashes=True)
        assert "its source 1 (a) lay on its author's machine" in refused(merged)
        assert "b is not its source 1 (a): model.safetensors has another sha256" in refused(
            merged, sources={"a": folders[1], "b": folders[1]})
        assert zoo.reproduce(merged, sources={"a": folders[0], "b": folders[1]}).reproduced

    def test_a_recipe_without_end(self, folders: list[Path], tmp_path: Path) -> None:
        out = zoo.save(zoo.fuse(folders, "average"), tmp_path / "fused")

        def deep(made: Any) -> None:
            recipe = {key: made[key] for key in ("strategy", "kind", "options", "seed")}
            for _ in range(40):
                recipe = {**recipe, "sources": [{"name": "x", "recipe": recipe}]}
            made["sources"] = recipe["sources"]

        rewrite(out, deep)
        assert "fusions of fusions, more than 8 deep" in refused(out)


class TestWithData:
    def given(self, folders: list[Path]) -> dict[str, Path]:
        return {str(number): folder for number, folder in enumerate(folders, 1)}

    @pytest.fixture
    def nets(self, digits: ImageData, tmp_path: Path) -> list[Path]:
        folders = []
        for seed in (1, 2):
            model = zoo.backbone("mnist_cnn", classes=digits.classes, seed=seed, device="cpu")
            folders.append(zoo.save(model, tmp_path / f"net{seed}"))
        return folders

    def test_a_trained_head(
        self, nets: list[Path], digits: ImageData, tmp_path: Path
    ) -> None:
        fused = zoo.fuse(nets, "concat", num_classes=3)
        zoo.transfer(fused, digits, "linear_probe", epochs=2, val=0.2, lr=0.01)
        out = zoo.save(fused, tmp_path / "fused")
        done = zoo.reproduce(out, sources=self.given(nets))
        assert not done.reproduced
        assert {key.partition(".")[0] for key in done.unchecked} == {"fuser", "head"}
        assert "it was trained (zoo/linear_probe on 48 images)" in done.notes[0]
        done = zoo.reproduce(out, sources=self.given(nets), data=digits)
        assert done.reproduced, done
        assert done.tolerance == 1e-3
        done = zoo.reproduce(out, sources=self.given(nets), data=digits.take(50))
        assert {each.tensor for each in done.differing} >= {"head.weight"}
        assert "the data may not be the same" in done.notes[0]

    def test_chosen_layers(self, folders: list[Path], tmp_path: Path) -> None:
        out = zoo.save(zoo.fuse(folders, "concat", num_classes=4, seed=3, layer=["blocks.1", None]),
                       tmp_path / "fused")
        assert zoo.reproduce(out, sources=self.given(folders)).reproduced

    def test_outputs_that_were_fitted(
        self, nets: list[Path], digits: ImageData, tmp_path: Path
    ) -> None:
        out = zoo.save(zoo.fuse(nets, "weighted", data=digits), tmp_path / "fused")
        done = zoo.reproduce(out, sources=self.given(nets))
        assert done.unchecked
        assert all(key.startswith("fuser.") for key in done.unchecked)
        assert "was fitted on 60 images" in done.notes[0]
        assert zoo.reproduce(out, sources=self.given(nets), data=digits).reproduced

    def test_weights_that_looked_at_data(
        self, nets: list[Path], digits: ImageData, tmp_path: Path
    ) -> None:
        out = zoo.save(zoo.fuse(nets, "fisher", data=digits), tmp_path / "fisher")
        assert "zoo/fisher looked at data (60 images); pass the same" in refused(
            out, sources=self.given(nets))
        assert zoo.reproduce(out, sources=self.given(nets), data=digits).reproduced
        given = {**self.given(nets), "base": nets[0]}
        out = zoo.save(zoo.fuse(nets, "task_arithmetic", base=nets[0], data=digits,
                                search={"scale": [0.2, 0.5]}), tmp_path / "searched")
        assert zoo.reproduce(out, sources=given, data=digits).reproduced

    def test_statistics_of_batch_norm(self, digits: ImageData, tmp_path: Path) -> None:
        folders = []
        for seed in (1, 2):
            model = zoo.backbone("test_resnet", classes=digits.classes, image_size=32, seed=seed,
                                 device="cpu")
            folders.append(zoo.save(model, tmp_path / f"resnet{seed}"))
        out = zoo.save(zoo.fuse(folders, "average", data=digits, norms="reestimated"),
                       tmp_path / "fused")
        done = zoo.reproduce(out, sources=self.given(folders))
        assert not done.reproduced
        assert not done.differing
        assert {key.rpartition(".")[2] for key in done.unchecked} == {
            "running_mean", "running_var", "num_batches_tracked"}
        assert zoo.reproduce(out, sources=self.given(folders), data=digits).reproduced


def test_a_new_head_does_not_depend_on_how_members_are_given(
    folders: list[Path], tmp_path: Path
) -> None:
    models = [zoo.load(folder, device="cpu") for folder in folders]
    heads = [zoo.fuse(members, "concat", num_classes=4, seed=5).state_dict()["head.weight"]
             for members in (models, folders)]
    assert torch.equal(*heads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folders: list[Path], tmp_path: Path, dtype: torch.dtype) -> None:
    built = [zoo.backbone("test_vit", num_classes=3, image_size=32, device="cpu", seed=seed,
                          dtype=dtype) for seed in (1, 2)]
    loaded = [zoo.load(folder, device="cpu", dtype=dtype) for folder in folders]
    rounded = zoo.fuse([zoo.load(folder, device="cpu") for folder in folders], "average").to(dtype)
    given = {"1": folders[0], "2": folders[1]}
    for number, (model, sources) in enumerate([
            (zoo.fuse(built, "average"), {}), (zoo.fuse(loaded, "average"), given),
            (zoo.fuse(loaded, "mean"), given), (rounded, given)]):
        saved = zoo.save(model, tmp_path / str(number))
        done = zoo.reproduce(saved, sources=sources)
        assert (done.reproduced, done.close, done.tolerance) == (True, 0, 0), number
    assert done.notes == (f"it was saved in {str(dtype)[6:]}, and is compared after the same "
                          "rounding",)
    with pytest.raises(ProvenanceError, match="it has other weights than those that were fused"):
        zoo.reproduce(saved, sources={"1": folders[1], "2": folders[0]})


def test_compared() -> None:
    saved = {"same": torch.tensor([1.0, float("nan")]), "close": torch.tensor([2.0, 0.0]),
             "far": torch.tensor([2.0]), "zero": torch.tensor([0.0]), "int": torch.tensor([100]),
             "shape": torch.ones(2), "gone": torch.ones(1), "left": torch.ones(1)}
    now = {"same": torch.tensor([1.0, float("nan")]), "close": torch.tensor([2.0, 0.001]),
           "far": torch.tensor([2.1]), "zero": torch.tensor([-0.0]), "int": torch.tensor([101]),
           "shape": torch.ones(3), "new": torch.ones(1)}
    exact, close, differing = compared(saved, now, 0.01, leave=("left",))
    assert (exact, close) == (1, 2)  # -0 is another number of bits, and as good as 0
    assert {each.tensor: each.problem for each in differing} == {
        "far": "has other numbers", "int": "has other numbers", "gone": "was not made",
        "new": "is not in the saved model",
        "shape": "is float32 [3], and was saved as float32 [2]"}
    assert compared(saved, now, 0.0)[1] == 1


def test_the_command(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["reproduce", *map(str, words)])
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    out = zoo.save(zoo.fuse(folders, "average"), tmp_path / "fused")
    given = [f"--source={number}={folder}" for number, folder in enumerate(folders, 1)]
    code, told, _ = run(out, *given)
    assert (code, "fused: reproduced: " in told, "bit for bit" in told) == (0, True, True)
    code, told, _ = run(out, *given, "--json")
    assert json.loads(told)["reproduced"] is True
    code, told, error = run(out)
    assert (code, told) == (1, "")
    assert "cannot be reproduced: its source 1" in error
    state = {key: tensor.clone() for key, tensor in load_tensors(out).items()}
    state["norm.bias"] += 1
    save_tensors(state, out / "model.safetensors")
    rewrite(out, lambda made: made["versions"].update(timm="0.1"))
    code, told, _ = run(out, *given)
    assert code == 1
    assert "not reproduced" in told
    assert "norm.bias has other numbers, by up to 1" in told
    assert "made with timm 0.1, compared with timm " in told
    assert run(out, "--source", "nonsense")[0] == 2
