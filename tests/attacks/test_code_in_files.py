"""Nothing is installed or executed because a file or a Hub repository names it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import zoo


def test_no_name_in_a_file_runs_anything(
    install: Callable[..., Path], tmp_path: Path, own_cache: Path
) -> None:
    site = install("sleeper", "open(__file__ + '.ran', 'w')").parent
    (site / "evil.py").write_text("open(__file__ + '.ran', 'w')")
    members = [zoo.backbone("test_resnet", num_classes=3, seed=0, device="cpu", image_size=32),
               zoo.backbone("mnist_cnn", num_classes=3, seed=0, device="cpu")]
    zoo.save(zoo.fuse(members, "concat"), tmp_path / "hub/org/name")
    zoo.save(members[0], tmp_path / "hub/org/plain")
    plain = tmp_path / "hub/org/plain/config.json"
    config = json.loads(plain.read_text())
    del config["zoo"]
    plain.write_text(json.dumps(config))

    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("untrusted.py"), tmp_path], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": path, "ZOO_CACHE": str(own_cache)})
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["seen"] == []
    assert [event.partition(" (")[0] for event in told["awake"]] == [
        "import evil", "subprocess.Popen"]
    assert not list(site.glob("sleeper*.ran"))
    assert told["attempts"] == {
        "an unknown plugin": "MissingPlugin MissingPlugin",
        **dict.fromkeys((
            "a wheel", "a module to understand", "a namespace", "a module", "a builder",
            "a strategy", "an option", "an activation", "a file", "an architecture",
            "another repository", "an argument", "a layer", "remote code",
        ), "FormatError FormatError"),
        "a pickle": "FormatError FormatError",
    }
