"""A pickle becomes safetensors on request, without running anything in it."""

from __future__ import annotations

import collections
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from zoo.cli import main
from zoo.errors import FormatError, OptionError
from zoo.tensors import load_tensors
from zoo.tensors.converting import convert_pickle
from zoo.tensors.reading import PICKLES


def pickled(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


class Runs:
    """Unpickled by a reader that runs code, it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_out_as_they_were(tmp_path: Path, zipped: bool) -> None:
    table = torch.rand(4, 3)
    state = collections.OrderedDict(
        weight=torch.nn.Parameter(table), tied=table, row=table[1], turned=table.t(),
        half=torch.ones(2, dtype=torch.bfloat16), count=torch.tensor(3), empty=torch.empty(0, 2),
        epoch=7, name="net")
    file = pickled(tmp_path / "x.pth", state, _use_new_zipfile_serialization=zipped)
    done = convert_pickle(file, tmp_path / "x.safetensors")
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == state.keys() - {"epoch", "name"}
    for key, tensor in loaded.items():
        assert torch.equal(tensor, state[key])
        assert tensor.dtype == state[key].dtype
    assert loaded["tied"].data_ptr() == loaded["weight"].data_ptr()
    assert (done.tied, done.dropped, done.key) == (("weight",), ("epoch", "name"), "")
    assert (done.tensors, done.size) == (7, (tmp_path / "x.safetensors").stat().st_size)


def test_where_the_weights_lie(tmp_path: Path) -> None:
    a, b = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    optimiser = {"state": {0: {"step": torch.ones(1)}}, "average": {"m": torch.ones(1)}}
    out = tmp_path / "out.safetensors"

    def converted(value: object, key: str | None = None) -> tuple[str, float]:
        done = convert_pickle(pickled(tmp_path / "x.pt", value), out, key=key)
        return done.key, float(load_tensors(out)["w"][0])

    assert converted({"state_dict": b, "optimizer": optimiser, "epoch": 3}) == ("state_dict", 1)
    assert converted({"inner": {"model": b}, "lr": 0.1}) == ("inner.model", 1)
    assert converted({"whatever": b}) == ("whatever", 1)
    both = {"model": a, "model_ema": b, "a.b": {"c": b}}
    with pytest.raises(OptionError, match=r"x.pt has weights in several places; say which with "
                                          r"--key: model, model_ema, a\.b\.c"):
        converted(both)
    assert converted(both, "model_ema") == ("model_ema", 1)
    assert converted(both, "a.b.c") == ("a.b.c", 1)
    with pytest.raises(OptionError, match=r"x\.pt has no tensors under 'ema'; say which .*model"):
        converted(both, "ema")
    with pytest.raises(FormatError, match="holds no mapping of names to tensors"):
        converted([torch.ones(1)])
    with pytest.raises(FormatError, match="has no tensors with names in it"):
        converted({"epoch": 3})


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.safetensors"

    def why(file: Path) -> str:
        with pytest.raises(FormatError) as caught:
            convert_pickle(file, out)
        assert "weights_only=False" not in str(caught.value)
        assert "add_safe_globals" not in str(caught.value)
        assert not out.exists()
        return caught.value.problem

    for zipped in (True, False):
        for value in ({"a": Runs()}, Runs()):
            file = pickled(tmp_path / "x.pt", value, _use_new_zipfile_serialization=zipped)
            assert "it asks for posix.system, and may run any program with it" in why(file)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Runs(), protocol=2))
    assert why(tmp_path / "x.pkl").startswith("is refused: it asks for posix.system")
    assert "it asks for torch.nn.modules.linear.Linear" in why(
        pickled(tmp_path / "x.pt", torch.nn.Linear(1, 1)))
    for data in (b"", b"garbage", b"PK\3\4", pickle.dumps({"a": 1}, protocol=5), b"\x80\2}q\0."):
        (tmp_path / "x.pt").write_bytes(data)
        assert why(tmp_path / "x.pt")
    assert why(tmp_path / "gone.pt") == "there is no such file"
    assert why(tmp_path) == "is a folder; name one of its files"
    assert why(pickled(tmp_path / "x.pt", {1: torch.ones(1)})) == "has no tensors with names in it"
    with pytest.raises(FormatError, match=r"ends in '\.safetensors'"):
        convert_pickle(pickled(tmp_path / "x.pt", {"a": torch.ones(1)}), tmp_path / "out.pt")
    assert not (tmp_path / "ran").exists()


def test_what_would_grow_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    file = pickled(tmp_path / "x.pt", {"a": torch.ones(1).expand(2**40)})
    with pytest.raises(FormatError, match=r"takes 4,398,046,511,104 bytes, and the file has 4 of"):
        convert_pickle(file, out)
    plain = pickled(tmp_path / "plain.pt", {"a": torch.zeros(250_000)})
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(FormatError, match="it is compressed, or says that it unpacks to more"):
        convert_pickle(file, out)
    assert not out.exists()


@pytest.mark.parametrize("ending", PICKLES)
def test_nothing_else_reads_a_pickle(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pickled(tmp_path / f"x{ending}", {"a": torch.ones(1)})
    for load in (lambda: zoo.load(file), lambda: zoo.backbone(file), lambda: load_tensors(file),
                 lambda: zoo.fuse([file, file], "average"),
                 lambda: zoo.merge([file, file], "average", out=tmp_path / "out")):
        with pytest.raises(FormatError, match=r"is a pickle, .*; none is ever loaded.*zoo convert"):
            load()
    with pytest.raises(SystemExit) as end:
        main(["merge", str(file), str(file), "--with", "average", "-o", str(tmp_path / "out")])
    assert end.value.code == 1
    assert f"`zoo convert {file} -o model.safetensors`" in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pickled(tmp_path / "x.pth", {"ema": {"w": torch.ones(2), "n": 3}})
    out = tmp_path / "x.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["convert", str(file), "-o", str(out)])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "1 tensors under 'ema'" in told
    assert "left out, no tensors: n" in told
    with pytest.raises(SystemExit):
        main(["convert", str(file), "-o", str(out), "--key", "ema", "--json"])
    assert json.loads(capsys.readouterr().out)["dropped"] == ["n"]
