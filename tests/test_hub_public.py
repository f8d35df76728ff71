"""The public Hub, on request: HF_TOKEN is set and ZOO_TEST_PUBLIC_HUB=1. It only reads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import zoo

ASKED = bool(os.environ.get("HF_TOKEN")) and os.environ.get("ZOO_TEST_PUBLIC_HUB") == "1"


@pytest.mark.skipif(not ASKED, reason="talks to the public Hub; set HF_TOKEN and "
                                      "ZOO_TEST_PUBLIC_HUB=1 to run it")
@pytest.mark.filterwarnings("ignore:batch norm's statistics were pooled")
def test_a_network_of_timm_is_pulled_fused_and_reproduced(tmp_path: Path) -> None:
    folder = zoo.pull("timm/test_resnet.r160_in1k", tmp_path / "pulled")
    told = zoo.load(folder, device="cpu")
    source = next(told.each_member()).source
    assert re.fullmatch("[0-9a-f]{40}", source["revision"])
    address = f"hf-hub:timm/test_resnet.r160_in1k@{source['revision']}"
    again = zoo.load(address, device="cpu")
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(told(images), again(images))
    named = zoo.backbone("timm/test_resnet.r160_in1k", pretrained=True, device="cpu")
    fused = zoo.fuse([named, again], "average", weight=[1, 3])
    done = zoo.reproduce(zoo.save(fused, tmp_path / "fused"))
    assert done.reproduced, done
    planned = zoo.push(tmp_path / "fused", "timm/test_resnet.r160_in1k", exist_ok=True,
                       dry_run=True)
    assert os.environ["HF_TOKEN"] not in str(planned.as_dict())
