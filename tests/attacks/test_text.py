"""Names in files that are commands to a terminal: they are shown, and not carried out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_models import saved

from zoo.cli import main
from zoo.cli.output import shown

# Clears the screen; sets the title; C1's form of the same; overrides the direction of reading.
HOSTILE = "cat\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\r\b\x7f"
COMMANDS = set("\x1b\x07\x9b\u202e\r\b\x7f")


def run(*words: str) -> None:
    with pytest.raises(SystemExit):
        main(words)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "fused")
    config = json.loads((folder / "config.json").read_text())
    model, made = config["zoo"]["model"], config["zoo"]["made_with"]
    model["classes"] = [HOSTILE, f"{HOSTILE}\n  source: honest/model", "c"]
    model["members"][0] |= {"name": HOSTILE, "classes": model["classes"]}
    model["fusion"]["strategy"] = HOSTILE
    made["sources"][0] |= {"name": HOSTILE, "license": HOSTILE}
    made["versions"]["torch"] = HOSTILE
    config["zoo"]["requires"] = [{"namespace": "evil", "requirement": "evil>=1"}]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("command", [
    ("show",), ("eval", "--data", "zoo/digits"), ("reproduce",), ("export", "-o", "x.onnx"),
    ("merge", "--with", "average", "-o", "out")])
def test_no_command_reaches_the_terminal(
    hostile: Path, tmp_path: Path, command: tuple[str, ...],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = command
    run(name, str(hostile), *options)
    told = capsys.readouterr()
    assert not COMMANDS & set(told.out + told.err)
    if name == "show":
        assert "\\x1b[2J" in told.out
        assert "\n  source: honest/model" not in told.out


def test_nor_does_one_in_the_name_of_a_file_or_a_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.dumps({HOSTILE: {"dtype": HOSTILE, "shape": [1], "data_offsets": [0, 1]}})
    file = tmp_path / f"{HOSTILE}.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"1")
    run("merge", str(file), str(file), "--with", "average", "-o", str(tmp_path / "out"))
    told = capsys.readouterr()
    assert "has dtype" in told.err
    assert not COMMANDS & set(told.out + told.err)


def test_other_text_is_left_alone() -> None:
    text = "Größe 猫 🐈‍⬛ naïve\tcafé\n–"
    assert shown(text) == text
