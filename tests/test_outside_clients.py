"""Programs of others, installed from the package index for these tests alone: transformers reads
what zoo saves and pushes, olah mirrors the Hub on loopback. They run with ZOO_OUTSIDE=1, as in
.ci/run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest
import torch
from fresh_venv import fresh_venv
from hub import Hub
from hub.client import environment
from PIL import Image
from small_models import saved

import zoo

pytestmark = pytest.mark.skipif(
    os.environ.get("ZOO_OUTSIDE") != "1", reason="ZOO_OUTSIDE=1 installs programs of others")

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
    subprocess.run([python, "-m", "pip", "install", "--quiet", "transformers"], check=True)
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
            env=environment(hub, tmp_path / "home"), capture_output=True, text=True, check=False)
        assert ran.stdout.endswith("equal\n"), ran.stderr


def test_olah_mirrors_the_hub(hub: Hub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "fused")
    commit = hub.store.seed("org/fused", folder)
    venv.create(tmp_path / "venv", with_pip=True)  # it brings a server's libraries of its own
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", "olah"], check=True, timeout=300)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mirror = f"http://127.0.0.1:{port}"
    log = tmp_path / "olah.txt"
    with log.open("w") as told, subprocess.Popen(
            [binaries / "olah-cli", "--host", "127.0.0.1", "--port", str(port),
             "--hf-scheme", "http", "--hf-netloc", hub.url.removeprefix("http://"),
             "--hf-lfs-netloc", hub.large_url.removeprefix("http://"),
             "--mirror-netloc", f"127.0.0.1:{port}", "--repos-path", str(tmp_path / "mirror")],
            cwd=tmp_path, stdout=told, stderr=told) as olah:
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(mirror, timeout=5).close()
                    break
                except urllib.error.HTTPError as error:
                    error.close()
                    break
                except OSError:
                    assert olah.poll() is None, log.read_text()
                    time.sleep(0.25)
            subprocess.run([sys.executable, "-c", MIRRORED, commit, str(folder)],
                           env={**environment(hub, tmp_path / "home"), "HF_ENDPOINT": mirror},
                           check=True, timeout=120)
        finally:
            olah.kill()
    assert hub.called("resolve") > 0
    assert hub.called("blob") > 0
