"""The two origins: the API with `resolve`, and the store of large files, which refuses a token."""

from __future__ import annotations

import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote

from hub.faults import Fault, Faults
from hub.repositories import Caller, Refused, Store
from hub.routes import API, LARGE, Answer, Request

_PACE = 1 << 18  # bytes at once of an answer that has a rate


class Hub:
    """Running from the beginning until `close`, or inside `with`.

    url: for HF_ENDPOINT. store: what it holds. log: (endpoint, method, path, status) of each call.
    leaks: requests that carried a token to the large files. latency: seconds before each answer.
    rate: bytes a second of each answer, None for as fast as it goes.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.faults = Faults()
        self.log: list[tuple[str, str, str, int]] = []
        self.leaks: list[str] = []
        self.latency = 0.0
        self.rate: float | None = None
        self.key = secrets.token_hex(8)  # signs the addresses of large files
        self._servers = [self._serve(ApiHandler), self._serve(LargeHandler)]
        self.url, self.large_url = (
            f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def _serve(self, handler: type[Handler]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": self}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def token(self, name: str, role: str = "write", organisations: tuple[str, ...] = ()) -> str:
        """A new token of a user."""
        token = f"hf_{secrets.token_hex(17)}"
        self.store.callers[token] = Caller(name, role, frozenset(organisations))
        return token

    def fail(self, *faults: Fault) -> None:
        """Let these happen from now on, and no others."""
        self.faults.plan(*faults)

    def called(self, endpoint: str) -> int:
        return sum(each[0] == endpoint for each in self.log)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its acknowledgement
    hub: ClassVar[Hub]
    routes: ClassVar[list[tuple[str, str, str, Callable[..., Answer]]]]

    def _dispatch(self) -> None:
        time.sleep(self.hub.latency)
        body = self._body()  # even of what is refused, or the next request begins inside it
        path, _, query = self.path.partition("?")
        path = path.replace("/api/spaces/", "/api/models/spaces/", 1)
        method = self.command.replace("HEAD", "GET")
        for old, new in self.hub.store.renamed.items():
            if re.search(rf"/{re.escape(old)}(?=[/.]|$)", path):
                self._send("renamed", Answer(307, b"", {"Location": self.path.replace(old, new)}))
                return
        found = next(((match, endpoint, function) for methods, pattern, endpoint, function
                      in self.routes if method in methods.split("|")
                      and (match := re.fullmatch(pattern, path))), None)
        if found is None:
            self._send("", Answer(404, {"error": f"no such call: {self.command} {path}"}))
            return
        match, endpoint, function = found
        fault = self.hub.faults.next(endpoint)
        if fault == "drop":
            self._hang_up(endpoint)
            return
        if fault == "page":
            self._send(endpoint, Answer(200, b"<html>Please accept our terms.</html>"))
            return
        if fault.isdigit():
            headers = {"Retry-After": "1"} if fault == "429" else {}
            self._send(endpoint, Answer(int(fault), {"error": f"fault {fault}"}, headers))
            return
        try:
            request = Request(
                self.hub, self._caller(), self.command, body, self.headers,
                {key: values[-1] for key, values in parse_qs(query).items()})
            answer = function(request, *(unquote(each) for each in match.groups() if each))
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            answer = Answer(refused.status, {"error": refused.message}, headers)
        if fault == "lost":
            self._hang_up(endpoint)
        else:
            self._send(endpoint, answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _caller(self) -> Caller:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.store.callers:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.store.callers.get(given, Caller())

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self, endpoint: str) -> None:
        self.hub.log.append((endpoint, self.command, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, endpoint: str, answer: Answer, fault: str = "") -> None:
        self.hub.log.append((endpoint, self.command, self.path, answer.status))
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(body[:len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            for start in range(0, len(body), max(len(body) // 4, 1)):
                time.sleep(0.05)
                self.wfile.write(body[start:start + max(len(body) // 4, 1)])
        elif fault == "corrupt":
            self.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))
        elif self.hub.rate:
            self._write_paced(body, self.hub.rate)
        else:
            self.wfile.write(body)

    def _write_paced(self, body: bytes, rate: float) -> None:
        due = time.monotonic()
        for start in range(0, len(body), _PACE):
            piece = memoryview(body)[start:start + _PACE]
            # What a slow client lets pass is not made up for, as on a line.
            due = max(due + len(piece) / rate, time.monotonic())
            time.sleep(max(0, due - time.monotonic()))
            self.wfile.write(piece)

    def log_message(self, *_: Any) -> None:
        pass


class ApiHandler(Handler):
    routes = API


class LargeHandler(Handler):
    routes = LARGE

    def _caller(self) -> Caller:
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.path)
            raise Refused(400, "A token was sent to a store that has no business with it")
        return Caller()
