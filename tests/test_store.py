"""Folder ⇄ model: round trips, what is refused and what it says, what the files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import zoo
from zoo.errors import BadName, FormatError, ZooError
from zoo.model import Model


def build(name: str = "test_vit", **arguments: Any) -> Model:
    given = {"num_classes": 4, "seed": 0, "device": "cpu",
             "image_size": 32 if name.startswith("test_") else None, **arguments}
    return zoo.backbone(name, **given)


def images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 36, 33, generator=torch.Generator().manual_seed(1))


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        return model(images())  # type: ignore[no-any-return]


def reloaded(model: Model, folder: Path) -> Model:
    return zoo.load(zoo.save(model, folder), device="cpu")


def edited(folder: Path, change: Callable[[Any], Any]) -> Path:
    """The folder with another config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(change(config) or config))
    return folder


@pytest.fixture(scope="module")
def every_kind() -> dict[str, Model]:
    data = TensorDataset(images(16), torch.arange(16) % 4)
    vit, resnet = build(), build("test_resnet")
    concat = zoo.fuse([vit, resnet], "concat", norm=False)
    weighted = zoo.fuse([concat, build("test_convnext")], "weighted", data=data)
    return {
        "single": vit,
        "small": build("mnist_cnn", width=2),
        "efficientnet": build("tf_efficientnet_lite0", image_size=32),
        "average": zoo.fuse([build(seed=1), build(seed=2)], "average"),
        "concat": concat,
        "gated": zoo.fuse([vit, resnet], "gated"),
        "attention": zoo.fuse([vit, resnet], "attention"),
        "aff": zoo.fuse([vit, resnet], "aff"),
        "nested": zoo.fuse([weighted, resnet, zoo.fuse([vit, vit], "average")], "mean"),
        "distilled": zoo.fuse([build("deit_tiny_distilled_patch16_224", image_size=32), vit],
                              "mean"),
        "bfloat16": build("eva02_tiny_patch14_224", image_size=28, dtype="bf16"),
        "relu": build(activation="relu"),
        "grey": build("test_resnet", in_chans=1),
    }


@pytest.mark.parametrize("kind", ["single", "small", "efficientnet", "average", "concat", "gated",
                                  "attention", "aff", "nested", "distilled", "bfloat16", "relu",
                                  "grey"])
def test_logits_are_identical_to_the_bit(
    every_kind: dict[str, Model], kind: str, tmp_path: Path
) -> None:
    model = every_kind[kind]
    again = reloaded(model, tmp_path / "m")
    assert torch.equal(logits(again), logits(model))
    assert (again.classes, again.fusion, again.name) == (model.classes, model.fusion, model.name)
    assert again.describe() == model.describe()
    assert again.recipe == model.recipe
    assert not any(module.training for module in again.modules())
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        zoo.save(again, tmp_path / "n") / "model.safetensors").read_bytes()


def test_loading_leaves_torchs_generator_alone_and_takes_device_and_dtype(tmp_path: Path) -> None:
    folder = zoo.save(build(), tmp_path / "m")
    before = torch.get_rng_state()
    model = zoo.load(str(folder), device="cpu", dtype="float64")
    assert torch.equal(torch.get_rng_state(), before)
    assert next(model.parameters()).dtype == torch.float64


def test_a_loaded_model_trains_and_its_files_stay_as_they_are(tmp_path: Path) -> None:
    model = reloaded(build(), tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    model(images()).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad if parameter.grad is not None else 0
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before


def test_shards(tmp_path: Path) -> None:
    model = zoo.fuse([build(), build("test_resnet")], "concat")
    folder = zoo.save(model, tmp_path / "m", max_shard_bytes=400_000)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(zoo.load(folder, device="cpu")), logits(model))
    shards[0].unlink()
    with pytest.raises(FormatError, match=f"needs {shards[0].name} for .* it is missing"):
        zoo.load(folder)


def test_an_earlier_model_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    zoo.save(build(), tmp_path / "m", max_shard_bytes=None)
    zoo.save(build("mnist_cnn"), tmp_path / "m")
    assert zoo.load(tmp_path / "m", device="cpu").name == "zoo/mnist_cnn"
    for name in ("notes.txt", ".git", "runs"):
        other = tmp_path / "m" / name
        other.mkdir() if name != "notes.txt" else other.write_text("mine")
        with pytest.raises(FormatError, match="is a folder with other things in it"):
            zoo.save(build(), tmp_path / "m")
        other.rmdir() if other.is_dir() else other.unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="is a folder with other things in it"):
        zoo.save(build(), tmp_path / "mine")


def test_only_models_are_saved() -> None:
    with pytest.raises(ZooError, match=r"save writes a zoo.Model, and a Linear is not one"):
        zoo.save(nn.Linear(1, 1), "nowhere")  # type: ignore[arg-type]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return zoo.save(zoo.fuse([build(), build("mnist_cnn")], "concat"), tmp_path / "m")

    def test_no_folder_and_no_config(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(FormatError, match=r"there is no such folder; a registered network is "
                           r"built by zoo.backbone, a Hub repository is 'hf-hub:org/name'"):
            zoo.load("timm/resnet18")
        (folder / "config.json").unlink()
        with pytest.raises(FormatError, match=r"is no model: it has no config.json"):
            zoo.load(folder)
        with pytest.raises(BadName, match="'hf-hub:…' or 'local-dir:…'"):
            zoo.load("folder:x")

    @pytest.mark.parametrize(("text", "message"), [
        ("{", "is damaged: Expecting property name"),
        ('{"zoo": NaN}', "is damaged: NaN is no JSON number"),
        ("[" * 100_000, "is damaged: .*recursion"),
        ("[]", "has neither the key 'zoo' nor 'architecture'"),
        ('{"model_type": "bert"}', "has neither the key 'zoo' nor 'architecture'"),
        ('{"zoo": 3}', "zoo.format is no version"),
        ('{"zoo": {"format": "1"}}', "zoo.format is no version"),
        ('{"zoo": {"format": 2}}', "has format 2, this version reads up to 1; install a newer"),
        ('{"zoo": {"format": 1, "must_understand": ["pruned"]}}', "needs pruned, which this "
         "version does not know; install a newer fusion-zoo"),
        ('{"zoo": {"format": 1, "requires": ["acme"]}}', "zoo.requires has 'acme'"),
        ('{"zoo": {"format": 1, "requires": 3}}', "zoo.requires is 3, expected a list"),
        ('{"zoo": {"format": 1}}', r"its model cannot be built \(KeyError: 'model'\)"),
        ('{"architecture": "resnet9000"}', "timm has no architecture 'resnet9000'"),
    ])
    def test_configs(self, folder: Path, text: str, message: str) -> None:
        (folder / "config.json").write_text(text)
        with pytest.raises(FormatError, match=message) as caught:
            zoo.load(folder)
        assert str(caught.value).startswith(str(folder / "config.json"))

    @pytest.mark.parametrize(("place", "value", "message"), [
        (("classes",), ["a", float("nan"), "b", "c"], "NaN is no JSON number"),
        (("classes",), ["a", None, "b", "c"], "its classes are not a list of names"),
        (("classes",), ["a", "a", "b", "c"], "the class 'a' stands twice"),
        (("classes",), ["a", "b"], r"'head.weight' is \[4, .*expected \[2, "),
        (("members",), [], "cannot be built"),
        (("fusion", "strategy"), "zoo/concta", "describes what cannot be built here: no fusion is "
         "called 'zoo/concta'; did you mean 'zoo/concat'"),
        (("fusion", "options"), {"norms": True}, "no option is called 'norms'"),
        (("members", 0, "dim"), 10**6, r"expected \[1000000\]"),
        (("members", 0, "preprocessing", "size"), [10**6, 32], "img_size is .*up to 4,096"),
        (("members", 0, "build", "backbone"), "timm/test_vti", "no backbone is called"),
        (("members", 0, "build", "num_classes"), 4, "has 4 outputs and 0 class names"),
        (("members", 0, "build", "image_size"), -1, "cannot be built here: timm/test_vit"),
        (("members", 0, "build", "in_chans"), 1, r"patch_embed.proj.weight' is .*expected"),
        (("members", 1, "build", "options"), {"width": 3}, r"conv1.weight' is .*expected \[48, 3"),
        (("members", 1, "build", "options"), {"width": 10**9}, "cannot be built .*RuntimeError"),
        (("members", 1, "build", "options"), {"width": "2"}, "the option 'width' is '2'"),
    ])
    def test_descriptions(
        self, folder: Path, place: tuple[Any, ...], value: object, message: str
    ) -> None:
        def change(config: Any) -> None:
            part = config["zoo"]["model"]
            for step in place[:-1]:
                part = part[step]
            part[place[-1]] = value

        with pytest.raises(FormatError, match=message):
            zoo.load(edited(folder, change))

    @pytest.mark.parametrize(("change", "message"), [
        (lambda t: t.pop("head.bias"), "tensor 'head.bias' is missing"),
        (lambda t: t.update(more=torch.ones(1)), "tensor 'more' belongs to no part of the model"),
        (lambda t: t.update({"head.bias": torch.ones(5)}),
         r"tensor 'head.bias' is \[5\], expected \[4\]"),
        (lambda t: t.update({"head.bias": torch.ones(4).int()}),
         "tensor 'head.bias' is torch.int32, expected torch.float32"),
    ])
    def test_tensors(
        self, folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        file = folder / "model.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)
        with pytest.raises(FormatError, match=f"does not fit its config: {message}"):
            zoo.load(folder)

    def test_files(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(FormatError, match="is cut off"):
            zoo.load(folder)
        file.rename(folder / "pytorch_model.bin")
        with pytest.raises(FormatError, match="is a pickle, and reading a pickle can run any"):
            zoo.load(folder)


class TestWhatIsWritten:
    def test_made_with(self, tmp_path: Path) -> None:
        members = [build("test_resnet", seed=seed) for seed in (1, 2)]
        next(members[0].each_member()).source.update(
            repository="timm/x", revision="0" * 40, sha256="1" * 64, license="apache-2.0")
        next(members[1].each_member()).source.update(license="Apache-2.0")
        fused = zoo.fuse(members, "ties", base=members[0], density=0.5, seed=3, norms="pooled")
        folder = zoo.save(fused, tmp_path / "m")
        made = json.loads((folder / "config.json").read_text())["zoo"]["made_with"]
        assert made["strategy"] == "zoo/ties"
        assert made["options"]["density"] == 0.5
        assert made["seed"] == 3
        assert made["sources"][0]["revision"] == "0" * 40
        assert made["sources"][0]["sha256"] == "1" * 64
        assert made["base"]["state_sha256"] == made["sources"][0]["state_sha256"]
        assert made["norms"] == [{"member": "timm/test_resnet.r160_in1k", "norms": "pooled"}]
        assert made["licences"] == ["apache-2.0"]
        assert made["versions"].keys() == {"torch", "timm", "fusion-zoo"}
        assert made["sha256"].keys() == {"model.safetensors"}

    def test_what_was_learnt_and_fused_is_remembered_through_files(self, tmp_path: Path) -> None:
        data = TensorDataset(images(8), torch.arange(8) % 4)
        model = build()
        zoo.transfer(model, data, "linear_probe", epochs=1)
        model = reloaded(model, tmp_path / "a")
        assert [done["method"] for done in model.recipe["transfers"]] == ["zoo/linear_probe"]
        fused = reloaded(zoo.fuse([model, build()], "concat"), tmp_path / "b")
        assert fused.recipe["sources"][0]["recipe"] == model.recipe

    def test_the_card_is_read_by_the_hub(
        self, every_kind: Mapping[str, Model], tmp_path: Path
    ) -> None:
        for kind, library in (("average", "timm"), ("nested", "fusion-zoo")):
            card = ModelCard.load(zoo.save(every_kind[kind], tmp_path / "m") / "README.md")
            assert card.data.library_name == library
            assert card.data.pipeline_tag == "image-classification"
            assert "merge" in (card.data.tags or [])
            assert yaml.safe_load(card.data.to_yaml())["tags"][-1] == "fusion-zoo"
            assert ("timm.create_model" in card.text) == (library == "timm")

    def test_the_card_names_what_it_was_made_of(self, tmp_path: Path) -> None:
        model = build()
        next(model.each_member()).source.update(repository="timm/test_vit", license="mit")
        card = ModelCard.load(zoo.save(model, tmp_path / "m") / "README.md")
        assert card.data.base_model == ["timm/test_vit"]
        assert card.data.license == "mit"
        assert card.data.to_dict()["base_model_relation"] == "finetune"

    def test_no_path_of_this_machine_is_in_a_file(self, tmp_path: Path) -> None:
        zoo.save(build(), tmp_path / "a")
        fused = zoo.fuse([tmp_path / "a", f"local-dir:{tmp_path / 'a'}"], "ties",
                         base=tmp_path / "a")
        nested = zoo.fuse([fused, tmp_path / "a"], "concat")
        folder = zoo.save(nested, tmp_path / "b")
        for file in folder.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes()

    def test_the_state_is_timms(self, tmp_path: Path) -> None:
        folder = zoo.save(build("test_resnet"), tmp_path / "m")
        net = timm.create_model("test_resnet", num_classes=4)
        assert load_file(folder / "model.safetensors").keys() == net.state_dict().keys()


def test_a_killed_save_leaves_the_old_model(tmp_path: Path) -> None:
    folder = zoo.save(build(seed=1), tmp_path / "m")
    before = logits(zoo.load(folder, device="cpu"))
    program = f"""
import os, zoo, zoo.store
zoo.store.folders.model_card = lambda *_, **__: os._exit(9)  # killed after the weights were written
zoo.save(zoo.backbone("mnist_cnn", device="cpu"), {str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    assert torch.equal(logits(zoo.load(folder, device="cpu")), before)
    zoo.save(build(seed=2), folder)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
