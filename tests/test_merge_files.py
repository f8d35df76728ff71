"""Files in, files out: what is written, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import zoo
from zoo.cli import main
from zoo.errors import BadName, DiskFull, FormatError, FusionError, OptionError, ShapeMismatch
from zoo.fusion import stream
from zoo.tensors import load_tensors, open_tensors, save_tensors


def state(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"embed.weight": torch.randn(70, 8, generator=generator) * scale,
            "layers.0.w": torch.randn(30, 11, generator=generator) * scale,
            "layers.1.w": torch.randn(5, generator=generator) * scale,
            "position": torch.arange(3)}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A base and three models beside it."""
    base = state(0)
    save_file(base, tmp_path / "base.safetensors")
    for number in (1, 2, 3):
        moved = {key: tensor + value if tensor.is_floating_point() else tensor
                 for (key, tensor), value in zip(base.items(), state(number, 0.1).values(),
                                                 strict=True)}
        save_file(moved, tmp_path / f"m{number}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("base", "m1", "m2", "m3")]


def mean(files: list[str]) -> dict[str, Tensor]:
    states = [load_file(file) for file in files]
    return {key: torch.stack([state[key].double() for state in states]).mean(0) for key in states[0]
            if states[0][key].is_floating_point()}


def want_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float) -> None:
    for key, tensor in other.items():
        assert torch.allclose(one[key].double(), tensor.double(), atol=tolerance), key


def test_one_file_out_of_several(files: list[str], tmp_path: Path) -> None:
    out = zoo.merge(files[1:], "average", out=tmp_path / "out.safetensors")
    merged = load_file(out)
    want_close(merged, mean(files[1:]), 1e-6)
    assert merged["position"].tolist() == [0, 1, 2]
    made = json.loads(open_tensors(out).metadata["made_with"])
    assert made["strategy"] == "zoo/average"
    assert [told["name"] for told in made["sources"]] == [
        "m1.safetensors", "m2.safetensors", "m3.safetensors"]
    assert str(tmp_path) not in json.dumps(made)  # a path here says nothing elsewhere
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "base.safetensors", "m1.safetensors", "m2.safetensors", "m3.safetensors",
        "out.safetensors"]


@pytest.mark.parametrize(("strategy", "options"), [
    ("task_arithmetic", {"scale": 0.3}), ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "convention": "mergekit"})])
def test_cuts_and_threads_give_the_same_bytes(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(stream, "_SMALL", 0)
    written = []
    for piece, threads in ((1 << 17, 1), (1 << 17, 2), (16, 3)):
        monkeypatch.setattr(stream, "PIECE", piece)
        monkeypatch.setattr(stream, "MEASURED_PIECE", 4 * piece)
        out = zoo.merge(files[1:], strategy, base=files[0], out=tmp_path / "out.safetensors",
                        threads=threads, **options)
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]


def test_shards_go_in_and_out(files: list[str], tmp_path: Path) -> None:
    whole = load_tensors(files[1])
    (tmp_path / "sharded").mkdir()
    save_tensors(whole, tmp_path / "sharded" / "model.safetensors", max_shard_bytes=1500)
    out = zoo.merge([tmp_path / "sharded", files[2]], "average", out=tmp_path / "out",
                    max_shard_bytes=1000)
    assert len(list(out.glob("model-*.safetensors"))) == 4
    want_close(load_tensors(out), mean(files[1:3]), 1e-6)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(whole)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    for number in (1, 2):
        tied = torch.full((4, 4), float(number))
        save_tensors({"embed": tied, "head": tied}, tmp_path / f"{number}.safetensors")
    out = zoo.merge([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], "average",
                    out=tmp_path / "o.safetensors")
    stored = open_tensors(out)
    assert stored.aliases == {"head": "embed"}
    assert stored["head"].unique().tolist() == [1.5]


def test_stochastic_rounding_keeps_changes_that_nearest_loses(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(1 << 16, generator=generator).bfloat16()}
    moved = {"w": base["w"].float() * (1 + 1e-3)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(moved, tmp_path / "moved.safetensors")

    def kept(rounding: Any) -> tuple[float, Tensor]:
        out = zoo.merge([tmp_path / "moved.safetensors"], "task_arithmetic", scale=1.0,
                        base=tmp_path / "base.safetensors", out=tmp_path / "o.safetensors",
                        dtype="bfloat16", rounding=rounding)
        merged = load_file(out)["w"]
        assert merged.dtype == torch.bfloat16
        change = (merged.float() - base["w"].float()) * base["w"].float().sign()
        wanted = (moved["w"] - base["w"].float()) * base["w"].float().sign()
        return (change.sum() / wanted.sum()).item(), merged

    assert kept("nearest")[0] < 0.3
    assert kept("stochastic")[0] == pytest.approx(1, abs=0.1)
    assert torch.equal(kept("stochastic")[1], kept("stochastic")[1])


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
def test_a_timm_folder_is_merged_as_in_memory_and_stays_timms(tmp_path: Path) -> None:
    import timm

    models = [zoo.backbone("timm/test_resnet", num_classes=3, seed=seed, device="cpu")
              for seed in (0, 1)]
    for number, model in enumerate(models):
        zoo.save(model, tmp_path / f"m{number}")
        (tmp_path / f"m{number}" / "README.md").write_text("theirs")
    fused = zoo.fuse(models, "average")
    out = zoo.merge([tmp_path / "m0", tmp_path / "m1"], "average", out=tmp_path / "out")
    merged = zoo.load(out, device="cpu")
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(merged(images), fused(images))
        net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        prepared = next(merged.each_member()).prepare(images)
        assert torch.equal(net(prepared), merged(images))
    assert merged.fusion is not None
    assert merged.fusion.strategy == "zoo/average"
    assert next(merged.each_member()).norms == "pooled"
    assert merged.recipe["sources"] == [{"name": "m0"}, {"name": "m1"}] or all(
        told["sha256"] for told in merged.recipe["sources"])
    assert "theirs" not in (out / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
def test_plain_timm_without_our_key_loads_again(tmp_path: Path) -> None:
    model = zoo.backbone("timm/test_resnet", num_classes=3, seed=0, device="cpu")
    zoo.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["zoo"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    out = zoo.merge([tmp_path / "m", tmp_path / "m"], "average", out=tmp_path / "out")
    again = zoo.load(out, device="cpu")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(again(images), model(images), atol=1e-5)
    assert again.recipe["strategy"] == "zoo/average"


def test_other_models_keep_what_lies_beside_them(files: list[str], tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"llm{number}"
        folder.mkdir()
        shutil.copy(files[number], folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "llama", "id2label": {"0": "a"}}')
        (folder / "tokenizer.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
    out = zoo.merge([tmp_path / "llm1", tmp_path / "llm2"], "average", out=tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["zoo"]["made_with"]["strategy"] == "zoo/average"
    # An earlier result is replaced, anything else is not.
    zoo.merge([out, tmp_path / "llm2"], "average", out=out)
    (out / "notes.md").write_text("mine")
    with pytest.raises(FormatError, match="is a folder with other things in it"):
        zoo.merge([tmp_path / "llm1", tmp_path / "llm2"], "average", out=out)
    assert (out / "notes.md").read_text() == "mine"


def test_what_does_not_belong_together_is_refused(files: list[str], tmp_path: Path) -> None:
    other = load_file(files[1])
    other["layers.0.w"] = torch.zeros(2)
    del other["embed.weight"]
    save_file(other, tmp_path / "other.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(ShapeMismatch, match=r"'embed.weight' is \[70, 8\] in member 1 and missing "
                                            r"in member 2; so do 'layers.0.w' differ"):
        zoo.merge([files[1], tmp_path / "other.safetensors"], "average", out=out)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor
            for key, tensor in load_file(files[1]).items()}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ShapeMismatch, match=r"torch.float32 in member 1 and torch.float16"):
        zoo.merge([files[1], tmp_path / "half.safetensors"], "average", out=out)
    assert not out.exists()


@pytest.mark.parametrize("strategy", ["average", "tsv_m"])
def test_values_that_are_not_finite_are_refused(
    files: list[str], tmp_path: Path, strategy: str
) -> None:
    broken = load_file(files[2])
    broken["layers.0.w"].view(-1)[1] = float("nan")
    save_file(broken, tmp_path / "broken.safetensors")
    out = tmp_path / "out.safetensors"
    base = {} if strategy == "average" else {"base": files[0]}
    with pytest.raises(FusionError, match=r"'layers.0.w' of member 2 has values that are not fin"):
        zoo.merge([files[1], tmp_path / "broken.safetensors"], strategy, out=out, **base)
    assert not out.exists()


@pytest.mark.parametrize("strategy", ["average", "ties", "tsv_m"])
def test_infinities_that_are_the_same_in_all_are_copied(
    files: list[str], tmp_path: Path, strategy: str
) -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    bounded = []
    for number, name in enumerate(files[:3]):
        bounded.append(tmp_path / f"bounded{number}.safetensors")
        save_file({**load_file(name), "mask": mask, "a.most": torch.tensor(math.inf)}, bounded[-1])
    merged = []
    for start, *inputs in (files[:3], bounded):
        base = {} if strategy == "average" else {"base": start}
        merged.append(load_file(zoo.merge(inputs, strategy, out=tmp_path / "out.safetensors",
                                          dtype="bfloat16", **base)))
    assert torch.equal(merged[1].pop("mask"), mask.bfloat16())
    assert merged[1].pop("a.most") == math.inf
    assert all(torch.equal(merged[1][key], tensor) for key, tensor in merged[0].items())


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"strategy": "concat"}, FusionError, "it fuses features, and files hold weights. Use"),
    ({"strategy": "greedy_soup"}, FusionError,
     "it needs the accuracy on held-out images, and files hold weights alone. Use zoo.fuse"),
    ({"strategy": "ties"}, FusionError, "starts from a base model, and none is given"),
    ({"base": "BASE"}, OptionError, "it does not use a base; leave base= out"),
    ({"rounding": "up"}, OptionError, "rounding is 'up', expected 'nearest' or 'stochastic'"),
    ({"threads": 0}, OptionError, "threads is 0, expected 1 or more"),
    ({"max_shard_bytes": 10}, OptionError, "one file is asked for, o.safetensors, and shards"),
    ({"inputs": "a"}, FusionError, "the inputs are 'a', expected a list"),
    ({"inputs": ["a", None]}, FusionError,
     "member 2 is a NoneType, expected a file, a folder or an address. zoo.fuse takes models"),
    ({"threads": "2"}, OptionError, "threads is '2', expected 1 or more"),
    ({"inputs": ["gone", "too"]}, FormatError, "gone: there is no such file or folder"),
    ({"inputs": ["folder:x", "y"]}, BadName, "a model's address is"),
    ({"density": 0.2}, OptionError, "no option is called 'density'"),
])
def test_wrong_arguments(
    files: list[str], tmp_path: Path, arguments: dict[str, Any], error: type[Exception],
    message: str,
) -> None:
    given = {"inputs": files[1:], "strategy": "average", "out": tmp_path / "o.safetensors",
             **arguments}
    if given.get("base") == "BASE":
        given["base"] = files[0]
    with pytest.raises(error, match=message):
        zoo.merge(given.pop("inputs"), given.pop("strategy"), **given)
    assert not (tmp_path / "o.safetensors").exists()


def test_labels_in_another_order_are_refused(tmp_path: Path) -> None:
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        zoo.save(zoo.backbone("timm/test_vit", classes=classes, seed=0, device="cpu"),
                 tmp_path / name)
    with pytest.raises(FusionError, match=r"have labels in another order, and files are merged "
                                          r"row by row. Use zoo.fuse"):
        zoo.merge([tmp_path / "a", tmp_path / "b"], "average", out=tmp_path / "out")


def test_a_full_disk_is_found_before_the_work(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="100 left"):
        zoo.merge(files[1:], "average", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_merge_leaves_nothing_that_looks_finished(
    files: list[str], tmp_path: Path
) -> None:
    zoo.merge(files[1:], "average", out=tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    script = (
        "import sys, time, zoo.merge_files.merging as merging, zoo\n"
        "def slow(*arguments):\n"
        "    print('working', flush=True)\n"
        "    time.sleep(60)\n"
        "merging.rounded = slow\n"
        "zoo.merge(sys.argv[1:4], 'average', out=sys.argv[4])\n")
    process = subprocess.Popen([sys.executable, "-c", script, *files[:3], str(tmp_path / "out")],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    left = [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]
    assert len(left) == 1
    zoo.merge(files[1:], "average", out=tmp_path / "out")  # the next one clears up
    assert not [file for file in tmp_path.iterdir() if file.name.endswith(".tmp")]


def test_memory_stays_small(tmp_path: Path) -> None:
    """Three inputs of 128 MB cost a few pieces of memory, not their size."""
    for number in range(3):
        save_file({"w": torch.full((1 << 25,), float(number))}, tmp_path / f"{number}.safetensors")
    script = (
        "import sys, torch, zoo\n"
        "def anonymous():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return max(int(line.split()[1]) for line in lines if line.startswith('RssAnon'))\n"
        "zoo.merge; torch.zeros(1 << 20); before = anonymous()\n"
        "import threading, time\n"
        "peak = [0]\n"
        "def watch():\n"
        "    while True:\n"
        "        peak[0] = max(peak[0], anonymous()); time.sleep(0.005)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
        "zoo.merge(sys.argv[1:4], 'average', out=sys.argv[4])\n"
        "print(peak[0] - before)\n")
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / f"{n}.safetensors") for n in range(3)),
         str(tmp_path / "out.safetensors")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 * 1024, f"{done.stdout} KB"


def test_hashes_are_recorded_when_asked_for(files: list[str], tmp_path: Path) -> None:
    import hashlib

    out = zoo.merge(files[1:], "average", out=tmp_path / "o.safetensors", hashes=True)
    told = json.loads(open_tensors(out).metadata["made_with"])["sources"][0]
    assert told["sha256"] == {
        "m1.safetensors": hashlib.sha256(Path(files[1]).read_bytes()).hexdigest()}


def test_the_command_line(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["merge", *files[1:], "--with", "ties", "--base", files[0], "--density", "0.3",
              "--weight", "{layers.*: [1, 0, 0], '*': 1}", "--shard-size", "2KB",
              "-o", str(tmp_path / "out")])
    assert end.value.code == 0
    assert "out: 2 files, 0.00 GB" in capsys.readouterr().out
    merged = load_tensors(tmp_path / "out")
    alone = load_tensors(zoo.merge(files[1:2], "ties", base=files[0], density=0.3,
                                   out=tmp_path / "alone.safetensors"))
    assert torch.allclose(merged["layers.0.w"], alone["layers.0.w"], atol=1e-6)
    assert not torch.allclose(merged["embed.weight"], alone["embed.weight"], atol=1e-6)
    with pytest.raises(SystemExit) as end:
        main(["merge", files[1], "--with", "average", "-o", str(tmp_path / "x")])
    assert end.value.code == 1
    assert "it takes at least 2, and 1 are given" in capsys.readouterr().err


def test_merging_imports_no_timm(files: list[str], tmp_path: Path) -> None:
    code = ("import sys, zoo; zoo.merge(sys.argv[1:3], 'average', out=sys.argv[3]); "
            "print([name for name in ('timm', 'torchvision') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, *files[:2], str(tmp_path / "o.safetensors")],
                          capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
