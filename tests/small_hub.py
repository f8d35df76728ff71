"""Load from a Hub on loopback, then without it. `huggingface_hub` reads its settings when it is
imported, so this runs in a process of its own: `python small_hub.py FOLDER`, where FOLDER has
`hub/org/name` and `expected.pt`. Prints what happened as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOME = Path(sys.argv[1])


class Hub(BaseHTTPRequestHandler):
    """The calls that a download makes: info of a revision, and HEAD and GET of its files."""

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main", parts[4:5])
        else:
            self._file("/".join(parts[:2]), parts[4])

    do_HEAD = do_GET

    def _info(self, repository: str, revision: str, kind: list[str]) -> None:
        folder = HOME / "hub" / repository
        if not folder.is_dir():
            return self._error("RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._error("RevisionNotFound")
        files = sorted(folder.iterdir())
        if kind == ["tree"]:
            return self._json([{"type": "file", "path": file.name, "size": file.stat().st_size,
                                "oid": _etag(file)} for file in files])
        return self._json({"id": repository, "sha": COMMIT,
                           "siblings": [{"rfilename": file.name} for file in files]})

    def _file(self, repository: str, name: str) -> None:
        file = HOME / "hub" / repository / name
        if not file.is_file():
            return self._error("EntryNotFound")
        return self._send(file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(file)}"'})

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update({
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(HOME / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    })
    (HOME / "hub/org/name/pytorch_model.bin").write_bytes(b"a pickle")
    import huggingface_hub.constants
    import torch

    import zoo
    from zoo.errors import WeightsError

    def source(model: zoo.Model) -> dict[str, Any]:
        return dict(next(model.each_member()).source)

    def refused(address: str) -> str:
        try:
            zoo.load(address, device="cpu")
        except WeightsError as error:
            return str(error)
        return "loaded"

    told: dict[str, Any] = {}
    model = zoo.load("hf-hub:org/name@main", device="cpu")
    told["source"] = source(model)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    told["equal"] = torch.equal(model(images), torch.load(HOME / "expected.pt"))
    told["pickle fetched"] = any((HOME / "cache").rglob("*.bin"))
    told["missing"] = refused("hf-hub:org/other")
    told["no revision"] = refused("hf-hub:org/name@v9")
    zoo.save(model, HOME / "saved")
    told["saved"] = source(zoo.load(HOME / "saved", device="cpu"))
    server.shutdown()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    told["again"] = source(zoo.load("hf-hub:org/name@main", device="cpu"))
    told["pinned"] = source(zoo.backbone(f"hf-hub:org/name@{COMMIT}", device="cpu"))
    told["never seen"] = refused("hf-hub:org/unseen")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
