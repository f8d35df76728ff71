"""`zoo space`: the app that it writes answers as the model does, and goes up as a Space."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml
from hub import Hub
from small_space import noise_picture, said_of, seed_space

import zoo
from zoo.cli import main
from zoo.errors import FormatError, HubError
from zoo.hub.space import write_space


@pytest.fixture
def seeded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    seed_space(hub, tmp_path)
    return hub


def ran(command: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(command)
    return caught.value.code


def app_of(folder: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("app", folder / "app.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_app_answers_as_the_models_do(seeded: Hub, tmp_path: Path) -> None:
    folder = write_space("me/fused", tmp_path / "app", beside=["me/one@main"])
    assert "gradio" not in sys.modules
    told = app_of(folder).answers(noise_picture())
    expected = said_of(noise_picture())
    assert list(told) == list(expected)
    for name, answer in told.items():
        assert list(answer) == list(expected[name])
        assert answer == pytest.approx(expected[name], abs=1e-6)
    assert [list(answer) for answer in told.values()] == [
        ["cat", "dog"], ["dog", "owl"], ["cat", "owl"], ["cat", "dog", "owl"]]


def test_a_folder_in_place_of_the_repository(
    seeded: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_space("me/fused", tmp_path / "app")
    monkeypatch.setenv("ZOO_MODEL", str(tmp_path / "me" / "one"))
    told = app_of(folder).answers(noise_picture())
    assert [list(answer) for answer in told.values()] == [["cat", "owl"]]


def test_what_the_space_says_of_itself(seeded: Hub, tmp_path: Path) -> None:
    folder = write_space("me/fused", tmp_path / "app", beside=["me/one"])
    front = yaml.safe_load((folder / "README.md").read_text("utf-8").split("---")[1])
    assert front["sdk"] == "gradio"
    assert front["app_file"] == "app.py"
    assert front["models"] == ["me/fused", "me/one"]
    assert (folder / "requirements.txt").read_text() == f"fusion-zoo=={zoo.__version__}\n"


def test_it_goes_up_once(
    seeded: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["space", "me/fused", "-o", str(tmp_path / "app"), "--push", "--private", "--json"]
    for _ in range(2):
        assert ran(command) == 0
        assert json.loads(capsys.readouterr().out)["url"] == f"{seeded.url}/spaces/me/fused"
    there = seeded.store.repositories["spaces/me/fused"]
    assert there.private
    assert len(there.commits) == 2  # the one that makes it, and ours
    assert there.commit_of("main").files["app.py"].data == (tmp_path / "app/app.py").read_bytes()
    assert set(there.commit_of("main").files) == {
        ".gitattributes", "README.md", "app.py", "requirements.txt"}
    assert ran([*command, "--beside", "me/one"]) == 1
    assert "there is a Space of this name with an app in it" in capsys.readouterr().err
    assert ran([*command, "--beside", "me/one", "--exist-ok"]) == 0
    assert len(there.commits) == 3
    there.private = False
    assert ran(command) == 1
    assert "the Space is public and private=True was asked for" in capsys.readouterr().err
    assert ran([*command, "--name", "you/app"]) == 1
    assert "this login may not do that" in capsys.readouterr().err


def test_no_app_of_what_cannot_be_shown(seeded: Hub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="the Hub has no such repository or revision") as caught:
        write_space("me/nothing", tmp_path / "app")
    assert caught.value.reason == "missing"
    other = tmp_path / "other"
    other.mkdir()
    (other / "data.csv").write_text("1,2")
    seeded.store.seed("me/data", other)
    with pytest.raises(HubError, match=r"me/data: it has no config\.json"):
        write_space("me/fused", tmp_path / "app", beside=["me/data"])
    (other / "config.json").write_text('{"model_type": "bert"}')
    seeded.store.seed("me/bert", other)
    with pytest.raises(FormatError, match="is no model that zoo reads"):
        write_space("me/bert", tmp_path / "app")
    shutil.copy(zoo.pull("me/fused") / "model.safetensors", other)
    seeded.store.seed("me/bert", other)
    with pytest.raises(FormatError, match="is not a model of zoo or timm"):
        write_space("me/bert", tmp_path / "app")
    assert not (tmp_path / "app").exists()
    with pytest.raises(FormatError, match="a folder with other things in it"):
        write_space("me/fused", other)
