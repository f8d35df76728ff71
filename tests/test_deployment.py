"""`zoo.export`: one file that answers as the model does, without zoo and timm."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.cli import main
from zoo.errors import ExportError, OptionError
from zoo.model import Model

ENDINGS = {"onnx": "m.onnx", "torch": "m.pt2"}


def small(name: str = "zoo/mnist_cnn", seed: int = 0, size: int | None = None) -> Model:
    return zoo.backbone(name, num_classes=4, image_size=size, seed=seed, device="cpu")


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """One of each kind; those of several members look at different sizes."""
    convolutions, vit = small("timm/resnet10t", size=32), small("timm/test_vit", 1, size=48)
    plain = small()
    return {
        "weights": zoo.fuse([convolutions, small("timm/resnet10t", 2, size=32)], "average",
                            norms="pooled"),
        "maps": zoo.fuse([convolutions, plain], "aff", hidden=16),
        "tokens": zoo.fuse([plain, vit], "attention", hidden=16),
        "outputs": zoo.fuse([convolutions, vit, plain], "mean"),
    }


def answers(file: Path, images: Tensor) -> Tensor:
    if file.suffix == ".pt2":
        answer: Tensor = torch.export.load(file).module()(images)
        return answer
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("format_", ENDINGS)
@pytest.mark.parametrize("kind", ["weights", "maps", "tokens", "outputs"])
def test_the_file_answers_as_the_model(
    models: dict[str, Model], kind: str, format_: str, tmp_path: Path
) -> None:
    model = models[kind]
    file = zoo.export(model, format_, out=tmp_path / ENDINGS[format_])
    assert list(tmp_path.iterdir()) == [file]
    images = torch.rand(5, 3, model.image_size, model.image_size)
    torch.testing.assert_close(answers(file, images), model(images).detach(), rtol=1e-4, atol=1e-4)


def test_it_runs_where_there_is_neither_zoo_nor_timm(
    models: dict[str, Model], tmp_path: Path
) -> None:
    model = models["outputs"]
    images = torch.rand(2, 3, 48, 48)
    np.save(tmp_path / "images.npy", images.numpy())
    zoo.export(model, out=tmp_path / "m.onnx")
    zoo.export(model, out=tmp_path / "m.pt2")
    program = """
import json, sys
sys.modules.update(zoo=None, timm=None)
import numpy as np, onnxruntime, torch
images = np.load("images.npy")
session = onnxruntime.InferenceSession("m.onnx")
extra = {"zoo": ""}
module = torch.export.load("m.pt2", extra_files=extra).module()
told = session.get_modelmeta().custom_metadata_map["zoo"]
assert json.loads(told) == json.loads(extra["zoo"])
print(json.dumps([session.run(["log_probabilities"], {"images": images})[0].tolist(),
                  module(torch.from_numpy(images)).tolist(), json.loads(told)]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    by_onnx, by_torch, told = json.loads(done.stdout)
    wanted = model(images).detach()
    for found in (by_onnx, by_torch):
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-4, atol=1e-4)
    assert told == {"classes": list(model.classes), "image_size": 48, "name": "zoo/mean",
                    "output": "log_probabilities"}


def test_a_fixed_batch(tmp_path: Path) -> None:
    file = zoo.export(small(), out=tmp_path / "m.onnx", batch_size=2)
    assert answers(file, torch.rand(2, 3, 28, 28)).shape == (2, 4)
    with pytest.raises(Exception, match=r"(?i)dimension"):
        answers(file, torch.rand(3, 3, 28, 28))


class Otherwise(nn.Module):
    """Answers something else once it is exported."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.net(images)
        return answer + 1 if torch.compiler.is_exporting() else answer


@pytest.mark.parametrize("format_", ENDINGS)
def test_a_file_that_answers_otherwise_is_refused(format_: str, tmp_path: Path) -> None:
    model = small()
    member = next(model.each_member())
    member.net = Otherwise(member.net)
    file = tmp_path / ENDINGS[format_]
    file.write_text("what was there")
    with pytest.raises(ExportError, match=r"answers otherwise .* differ by up to 1\b"):
        zoo.export(model, format_, out=file)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there"]


class DependsOnValues(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


@pytest.mark.parametrize("format_", ENDINGS)
def test_a_network_that_cannot_be_written(
    format_: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = small()
    next(model.each_member()).net = DependsOnValues()
    with pytest.raises(ExportError, match=r"zoo/mnist_cnn cannot be written this way: Could not "
                                          r"guard on data-dependent"):
        zoo.export(model, format_, out=tmp_path / ENDINGS[format_])
    assert not list(tmp_path.iterdir())
    assert "def forward" not in capfd.readouterr().err


class OfTwo(nn.Module):
    """Once it is exported it takes two images and no other number."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).view(len(images), 3)


@pytest.mark.parametrize("format_", ENDINGS)
def test_a_file_that_takes_one_number_of_images_alone(format_: str, tmp_path: Path) -> None:
    model = small()
    next(model.each_member()).net = OfTwo()
    with pytest.raises(ExportError, match=r"try batch_size=|a fixed batch_size="):
        zoo.export(model, format_, out=tmp_path / ENDINGS[format_])


@pytest.mark.parametrize("format_", ENDINGS)
def test_what_no_file_can_do_is_said_first(
    format_: str, tmp_path: Path
) -> None:
    members = [small(seed=seed) for seed in (1, 2)]
    with pytest.raises(ExportError, match=r"leaves members out .* fuse it without exit="):
        zoo.export(zoo.fuse(members, "mean", exit="confident"), out=tmp_path / ENDINGS[format_])
    with pytest.raises(zoo.ZooError, match="stacking has not been fitted"):
        zoo.export(zoo.fuse(members, "stacking"), out=tmp_path / ENDINGS[format_])


def test_what_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with pytest.raises(OptionError, match="no format 'onxx'; did you mean 'onnx'"):
        zoo.export(model, "onxx", out=tmp_path / "m.onnx")
    with pytest.raises(OptionError, match=r"does not say which format; .* \.onnx or \.pt2"):
        zoo.export(model, out=tmp_path / "m.bin")
    with pytest.raises(OptionError, match="batch_size is 0, expected 1 or more"):
        zoo.export(model, out=tmp_path / "m.onnx", batch_size=0)
    with pytest.raises(ExportError, match="there is no folder"):
        zoo.export(model, out=tmp_path / "none" / "m.onnx")
    with pytest.raises(zoo.ZooError, match=r"writes a zoo\.Model"):
        zoo.export("a", out=tmp_path / "m.onnx")  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'fusion-zoo\[onnx\]'"):
        zoo.export(model, out=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_that_no_onnx_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.deployment.ONNX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"less than 1,000 bytes and the weights are [\d,]+; "
                                          "write it as 'torch'"):
        zoo.export(small(), out=tmp_path / "m.onnx")


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    zoo.export(model, out=tmp_path / "m.pt2")
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zoo.save(small(), tmp_path / "net")
    for wanted, arguments in ((0, ["-o", str(tmp_path / "m.onnx")]),
                              (1, ["-o", str(tmp_path / "m.txt")])):
        with pytest.raises(SystemExit) as end:
            main(["export", str(tmp_path / "net"), *arguments])
        assert end.value.code == wanted
    told = capsys.readouterr()
    assert "m.onnx: zoo/mnist_cnn, 4 classes" in told.out
    assert "let it end in .onnx or .pt2" in told.err
