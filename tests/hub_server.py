"""A Hub on the loopback interface, for tests: it serves folders as repositories and misbehaves on request.

    with HubServer() as hub:
        commit = hub.add("org/name", folder)
        hub.fault("model.safetensors", status=503, times=1)
        subprocess.run([...], env=hub_environment(hub, tmp_path))
        assert hub.sent("model.safetensors") == 0

Each row of ROUTES is one call of the Hub's protocol. A repository is a set of commits, each a table of files held in
memory, so a commit stays as it was when the folder or the branch moves on.
"""

import json
import mmap
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import hub_reading
import hub_writing
from hub_store import TOKEN as TOKEN
from hub_store import File, Repo, User


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `part`; `times` None is always."""

    part: str
    method: str = "GET"
    times: int | None = None
    status: int | None = None  # answer with this error
    delay: float = 0.0  # seconds before the answer
    stall: int | None = None  # of an answer, or of an upload: after this many bytes nothing moves any more
    cut: int | None = None  # of an answer, or of an upload: after this many bytes close the connection
    short: int | None = None  # promise and send only this many bytes
    body: bytes | None = None  # answer with this page instead
    whole: bool = False  # ignore the range that was asked for
    lost: bool = False  # do what was asked for, then close the connection without an answer
    after: int = 0  # this many requests go well before
    action: Callable[[], None] | None = None  # what happens before the answer


@dataclass(frozen=True)
class Request:
    """One answered request. `sent` counts the bytes of the answer's body, `token` tells whether one was shown."""

    method: str
    path: str
    status: int
    sent: int
    token: bool
    body: bytes = b""


class Server(ThreadingHTTPServer):
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave
            super().handle_error(request, client_address)


class HubServer:
    """The server, running inside its `with` block. `storage_url` is a second address, where signed links point."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.user = User()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.closing = threading.Event()
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._servers = [Server(("127.0.0.1", 0), handler), Server(("127.0.0.1", 0), handler)]
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        self.storage_url = f"http://localhost:{self._servers[1].server_port}"  # another host, to a client

    def __enter__(self) -> "HubServer":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away, and break the connections that clients hold."""
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        for connection in self.connections:
            with suppress(OSError):  # closed long ago
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, folder: Path, revision: str = "main", **options: bool) -> str:
        """Commit a folder to a branch; the options gated, private and storage are the repository's. The commit."""
        files = {
            path.relative_to(folder).as_posix(): File.read(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        repo = self.repos.setdefault(repo_id, Repo())
        for name, value in options.items():
            setattr(repo, name, value)
        return repo.commit(revision, files)

    def fault(self, part: str, **kind: Any) -> None:
        self.faults.append(Fault(part, **kind))

    def before(self, part: str, action: Callable[[], None]) -> None:
        """Let something happen once, right before a POST to a path that contains `part` is answered."""
        self.fault(part, method="POST", times=1, action=action)

    def bodies(self, part: str) -> list[Any]:
        """The JSON that came with POST requests to paths that contain `part`."""
        return [json.loads(r.body) for r in self.requests if part in r.path and r.method == "POST"]

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.part in path and fault.method == method and fault.times != 0:
                    if fault.after:
                        fault.after -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault("")

    def count(self, part: str = "", method: str = "") -> int:
        """Answered requests whose path contains `part`."""
        return sum(part in r.path and method in r.method for r in self.requests)

    def received(self, part: str = "") -> int:
        """Bytes of bodies that came for paths that contain `part`."""
        return sum(len(r.body) for r in self.requests if part in r.path)

    def sent(self, part: str = "") -> int:
        """Bytes of bodies sent for paths that contain `part`; for a redirected file, its storage path has its name."""
        return sum(r.sent for r in self.requests if part in r.path)


class Handler(hub_reading.Reading, hub_writing.Writing, BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait 40 ms for the client's word

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        self._dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.broken = self.hub.take_fault(self.command, unquote(path))
        if not self._receive():
            return None
        self.hub.closing.wait(self.broken.delay)
        if self.broken.action:
            self.broken.action()
        if self.broken.body is not None:
            return self.answer(200, self.broken.body, {"Content-Type": "text/html"})
        if self.broken.status is not None:
            return self.refuse(self.broken.status, "")
        for method, pattern, action in ROUTES:
            if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                return action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        return self.refuse(404, "")

    def _receive(self) -> bool:
        """Read the body. False if the connection is to break in the middle of it, or the client has broken it."""
        broken, self.body = self.broken, b""
        limit = (broken.cut if broken.stall is None else broken.stall) if self.command == "PUT" else None
        if self._read_body(limit) and limit is None:
            return True
        self.close_connection = True
        if limit is not None:
            if broken.action:
                broken.action()
            if broken.stall is not None:
                self.hub.closing.wait()
            self._record(0, b"")
            with suppress(OSError):  # the client may have gone
                self.connection.shutdown(socket.SHUT_RDWR)
        return False

    def _read_body(self, limit: int | None) -> bool:
        """Whether all of it came, or as much as the limit says."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            wanted = length if limit is None else min(limit, length)
            self.body = self.rfile.read(wanted)
            return len(self.body) == wanted
        while limit is None or len(self.body) < limit:
            if not (line := self.rfile.readline()):
                return False
            self.body += self.rfile.read(int(line, 16))
            self.rfile.readline()
            if int(line, 16) == 0:
                break
        return True

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization")

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        names = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        body = json.dumps({"error": code or f"HTTP {status}"}).encode()
        self.answer(status, body, {"Content-Type": "application/json"} | names | (headers or {}))

    def answer_json(self, value: object, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes | mmap.mmap, headers: dict[str, str]) -> None:
        if self.broken.short is not None:
            body = body[: self.broken.short]
        length = len(body)
        if self.command == "HEAD":
            body = b""
        elif self.broken.cut is not None:
            body, self.close_connection = body[: self.broken.cut], True
        if self.broken.lost:
            self._record(status, b"")
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        # Recorded before it is sent: a client that has its answer finds it in the record.
        self._record(status, body)
        try:
            self.end_headers()
            if self.broken.stall is not None and self.command != "HEAD":
                self.wfile.write(body[: self.broken.stall])
                self.hub.closing.wait()
                self.close_connection = True
                return
            self.wfile.write(body)
        except ConnectionError:  # the client has had enough
            self.close_connection = True

    def _record(self, status: int, body: bytes | mmap.mmap) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, status, len(body), bool(self.token), self.body))


# One row per call: methods, path, action. The first row that fits answers.
ROUTES: list[tuple[str, str, Callable[..., None]]] = [*hub_writing.ROUTES, *hub_reading.ROUTES]


def hub_environment(server: HubServer, tmp_path: Path) -> dict[str, str]:
    """The environment for a process that is to see this Hub, with a cache of its own and nobody logged in."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    home = tmp_path / "huggingface"
    return kept | {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def use_hub(monkeypatch: Any, server: HubServer, tmp_path: Path) -> None:
    """The same for this process, until the end of the test: huggingface_hub has read the environment by now, but looks
    its constants up at every call. Waits between retries are left out.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    environment = hub_environment(server, tmp_path)
    for name in os.environ.keys() - environment.keys():
        monkeypatch.delenv(name)
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", environment["HF_HUB_CACHE"])
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    close_session()  # a client made before may go through a proxy
