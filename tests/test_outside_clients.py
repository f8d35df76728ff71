"""Programs of others, installed from the package index for these tests alone: transformers reads
what zoo saves and pushes, olah mirrors the Hub on loopback, gradio serves what `zoo space` writes.
They run with ZOO_OUTSIDE=1, as in .ci/run."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fresh_venv import fresh_venv
from hub import Hub
from hub.client import environment
from PIL import Image
from small_models import saved
from small_space import noise_picture, said_of, seed_space

import zoo
from zoo.hub.space import GRADIO, write_space

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(
    os.environ.get("ZOO_OUTSIDE") != "1", reason="ZOO_OUTSIDE=1 installs programs of others")


def install(python: Path, *packages: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=300)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def started(
    command: Sequence[str | Path], url: str, folder: Path, env: Mapping[str, str]
) -> Iterator[None]:
    """A server, from when it answers; what it says goes to a file beside `folder`."""
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as told, subprocess.Popen(
            command, cwd=folder, env=env, stdout=told, stderr=told) as server:
        try:
            late = time.monotonic() + 120
            while not _answers(url):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < late, f"not up in two minutes: {log.read_text()}"
                time.sleep(0.25)
            yield
        finally:
            server.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


TRANSFORMERS = """
import sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
name, place = sys.argv[1:3]
torch.set_num_threads(int(sys.argv[3]))  # another number rounds sums otherwise
assert "zoo" not in sys.modules
pixels, expected = torch.load(f"{place}/x.pt")
net, told = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
assert not any(told.values()), told
assert net.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
picture = Image.open(f"{place}/x.png")
prepared = AutoImageProcessor.from_pretrained(name)(picture)["pixel_values"]
assert torch.allclose(prepared, pixels, atol=1e-5), (prepared - pixels).abs().max()
with torch.no_grad():
    assert torch.equal(net(pixels).logits, expected)
best = pipeline("image-classification", model=name)(picture)[0]["label"]
assert best == ["cat", "dog", "owl"][int(expected.argmax())]
print("equal")
"""

MIRRORED = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
commit, folder = sys.argv[1], Path(sys.argv[2])
assert HfApi().model_info("org/fused").sha == commit
for revision in ("main", commit):
    down = Path(snapshot_download("org/fused", revision=revision))
    assert down.name == commit
    for file in folder.iterdir():
        assert (down / file.name).read_bytes() == file.read_bytes(), file.name
"""


def test_transformers_reads_fused_weights(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fresh_venv(tmp_path / "venv")
    install(python, "transformers")
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    made = zoo.fuse([zoo.backbone("test_vit", classes=["cat", "dog", "owl"], image_size=32,
                                  seed=seed, device="cpu") for seed in (1, 2)], "average")
    zoo.push(zoo.save(made, tmp_path / "fused"), "me/fused")
    noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(1))
    Image.fromarray((noise * 255).byte().numpy()).save(tmp_path / "x.png")
    pixels = (noise * 255).byte().permute(2, 0, 1)[None] / 255
    member = next(made.each_member())
    with torch.no_grad():
        torch.save((member.prepare(pixels), made(pixels)), tmp_path / "x.pt")
    for name in (str(tmp_path / "fused"), "me/fused"):
        ran = subprocess.run(
            [python, "-c", TRANSFORMERS, name, str(tmp_path), str(torch.get_num_threads())],
            env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=False,
            timeout=120)
        assert ran.stdout.endswith("equal\n"), ran.stderr


def test_olah_mirrors_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "fused")
    commit = hub.store.seed("org/fused", folder)
    venv.create(tmp_path / "venv", with_pip=True)  # it brings a server's libraries of its own
    install(tmp_path / "venv" / "bin" / "python", "olah")
    port = free_port()
    mirror = f"http://127.0.0.1:{port}"
    command = [
        tmp_path / "venv" / "bin" / "olah-cli", "--host", "127.0.0.1", "--port", str(port),
        "--hf-scheme", "http", "--hf-netloc", hub.url.removeprefix("http://"),
        "--hf-lfs-netloc", hub.large_url.removeprefix("http://"),
        "--mirror-netloc", f"127.0.0.1:{port}", "--repos-path", "mirror"]
    (tmp_path / "olah").mkdir()
    with started(command, mirror, tmp_path / "olah", os.environ):
        subprocess.run([sys.executable, "-c", MIRRORED, commit, str(folder)],
                       env={**environment(hub, tmp_path / "home"), "HF_ENDPOINT": mirror},
                       check=True, timeout=120)
    assert hub.called("resolve") > 0
    assert hub.called("blob") > 0


@pytest.fixture(scope="module")
def gradio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the gradio that a Space asks for and, where it has a browser to drive,
    playwright."""
    python = fresh_venv(tmp_path_factory.mktemp("gradio") / "venv")
    install(python, f"gradio=={GRADIO}", *(["playwright"] if BROWSER else []))
    return python


@pytest.fixture
def space(
    hub: Hub, gradio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a Space that runs; the picture to drop is at x.png."""
    monkeypatch.setenv("HF_TOKEN", hub.token("me"))
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")  # of the server and its client
    seed_space(hub, tmp_path)
    noise_picture().save(tmp_path / "x.png")
    folder = write_space("me/fused", tmp_path / "app", beside=["me/one"])
    port = free_port()
    env = {**environment(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT),
           "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port),
           "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    with started([gradio, "app.py"], f"http://127.0.0.1:{port}", folder, env):
        yield f"http://127.0.0.1:{port}"


CLIENT = """
import json
import sys
from gradio_client import Client, handle_file
url, picture = sys.argv[1:]
client = Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 30})
told = client.submit(handle_file(picture), api_name="/answers").result(timeout=60)
headings = [part["props"]["label"] for part in client.config["components"]
            if part["type"] == "label"]
print(json.dumps(dict(zip(headings, told, strict=True))))
"""


def test_a_space_answers_over_http(gradio: Path, space: str, tmp_path: Path) -> None:
    ran = subprocess.run([gradio, "-c", CLIENT, space, tmp_path / "x.png"], capture_output=True,
                         text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    expected = said_of(noise_picture())
    assert list(told) == list(expected)
    for name, shares in expected.items():
        assert told[name]["label"] == max(shares, key=shares.__getitem__)
        shown = {each["label"]: each["confidence"] for each in told[name]["confidences"]}
        assert shown == pytest.approx(shares, abs=1e-6)


PAGE = """
import sys
from playwright.sync_api import sync_playwright
url, picture, browser, shares = sys.argv[1:]
with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(60_000)
    page.goto(url, wait_until="domcontentloaded")
    page.locator("input[type=file]").first.wait_for(state="attached")
    page.locator("input[type=file]").first.set_input_files(picture)
    page.wait_for_function(f"document.body.innerText.split('%').length > {shares}")
    print(page.locator("body").inner_text())
    chromium.close()
"""


@pytest.mark.skipif(not BROWSER, reason="needs chromium or chrome on the PATH")
def test_a_space_in_a_browser(gradio: Path, space: str, tmp_path: Path) -> None:
    expected = said_of(noise_picture())
    ran = subprocess.run(
        [gradio, "-c", PAGE, space, tmp_path / "x.png", str(BROWSER),
         str(sum(map(len, expected.values())))],
        capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stderr
    shown = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
    for name, shares in expected.items():
        best = sorted(shares, key=shares.__getitem__, reverse=True)
        column = [name, best[0], *(
            line for label in best for line in (label, f"{round(shares[label] * 100)}%"))]
        assert " ".join(column) in " ".join(shown)
