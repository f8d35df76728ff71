"""Programs of others, installed from the package index for these tests alone: transformers reads
what zoo saves and pushes. They run with ZOO_OUTSIDE=1, as in .ci/run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from fresh_venv import fresh_venv
from hub import Hub
from hub.client import environment
from PIL import Image

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
