"""`zoo space`: the app that it writes answers as the model does, and goes up as a Space."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hub import Hub
from hub.client import environment
from PIL import Image

import zoo
from zoo.cli import main
from zoo.errors import FormatError, HubError
from zoo.hub.space import write_space

ROOT = Path(__file__).parents[1]


@pytest.fixture
def picture() -> Image.Image:
    noise = torch.rand(40, 70, 3, generator=torch.Generator().manual_seed(1))
    return Image.fromarray((noise * 255).byte().numpy())


@pytest.fixture
def seeded(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """me/fused joins two networks that know different classes; me/one is a network alone."""
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    nets = [zoo.backbone("test_vit", classes=classes, image_size=32, seed=seed, device="cpu")
            for seed, classes in enumerate((["cat", "dog"], ["dog", "owl"], ["cat", "owl"]))]
    for name, model in (("me/fused", zoo.fuse(nets[:2], "mean")), ("me/one", nets[2])):
        hub.store.seed(name, zoo.save(model, tmp_path / name))
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


def test_the_app_answers_as_the_models_do(
    seeded: Hub, tmp_path: Path, picture: Image.Image
) -> None:
    folder = write_space("me/fused", tmp_path / "app", beside=["me/one@main"])
    assert "gradio" not in sys.modules
    told = app_of(folder).answers(picture)
    assert list(told) == ["timm/test_vit.r160_in1k (1)", "timm/test_vit.r160_in1k (2)", "one",
                          "fused"]
    square = picture.resize((56, 32), Image.Resampling.BICUBIC).crop((12, 0, 44, 32))
    pixels = torch.tensor(list(square.tobytes())).view(1, 32, 32, 3).permute(0, 3, 1, 2) / 255
    fused, one = (zoo.load(f"hf-hub:me/{name}", device="cpu") for name in ("fused", "one"))
    with torch.no_grad():
        expected = [*((member.classes, member(pixels)) for member in fused.each_member()),
                    (one.classes, one(pixels)), (fused.classes, fused(pixels))]
    for answer, (classes, logits) in zip(told.values(), expected, strict=True):
        assert tuple(answer) == classes
        assert torch.allclose(torch.tensor(list(answer.values())), logits[0].softmax(0), atol=1e-6)
    assert [list(answer) for answer in told.values()] == [
        ["cat", "dog"], ["dog", "owl"], ["cat", "owl"], ["cat", "dog", "owl"]]


def test_a_folder_in_place_of_the_repository(
    seeded: Hub, tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_space("me/fused", tmp_path / "app")
    monkeypatch.setenv("ZOO_MODEL", str(tmp_path / "me" / "one"))
    assert [list(told) for told in app_of(folder).answers(picture).values()] == [["cat", "owl"]]


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
    assert not (tmp_path / "app").exists()
    with pytest.raises(FormatError, match="a folder with other things in it"):
        write_space("me/fused", other)


@contextmanager
def serving(folder: Path, hub: Hub, home: Path) -> Iterator[str]:
    """The app as a Space runs it, from the Hub on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {**environment(hub, home), "GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(ROOT),
            "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_NAME": "127.0.0.1"}
    url = f"http://127.0.0.1:{port}"
    with (home.parent / "app.log").open("w") as log, subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=told, stdout=log, stderr=log) as app:
        try:
            for _ in range(240):
                try:
                    with urllib.request.urlopen(url, timeout=5):
                        break
                except OSError:
                    assert app.poll() is None, (home.parent / "app.log").read_text()
                    time.sleep(0.25)
            yield url
        finally:
            app.terminate()


def test_in_a_browser(seeded: Hub, tmp_path: Path, picture: Image.Image) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    lacking = [name for name in ("gradio", "playwright") if not importlib.util.find_spec(name)]
    if lacking or not browser:
        pytest.skip(f"needs {', '.join([*lacking, *([] if browser else ['chromium'])])}")
    from playwright.sync_api import sync_playwright

    folder = write_space("me/fused", tmp_path / "app", beside=["me/one"])
    picture.save(tmp_path / "noise.png")
    with (serving(folder, seeded, tmp_path / "home") as url, sync_playwright() as playwright):
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        page.goto(url, wait_until="domcontentloaded")
        page.locator("input[type=file]").first.wait_for(state="attached", timeout=60_000)
        page.locator("input[type=file]").first.set_input_files(tmp_path / "noise.png")
        page.get_by_text("%").first.wait_for(timeout=60_000)
        shown = page.locator("body").inner_text()
        if kept := os.environ.get("ZOO_SCREENSHOT"):
            page.screenshot(path=kept)
        chromium.close()
    for name, classes in app_of(folder).answers(picture).items():
        assert name in shown
        for label, share in classes.items():
            assert label in shown
            assert f"{round(share * 100)}%" in shown, (label, share, shown)
