"""A Hub on the loopback interface, for tests: it serves folders as repositories and misbehaves on request.

    with HubServer() as hub:
        commit = hub.add("org/name", folder)
        hub.fault("model.safetensors", status=503, times=1)
        subprocess.run([...], env=hub_environment(hub, tmp_path))
        assert hub.sent("model.safetensors") == 0

Each row of ROUTES is one call of the Hub's protocol. A repository is a set of commits, each a table of files held in
memory, so a commit stays as it was when the folder or the branch moves on.
"""

import hashlib
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
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopbackToken"  # opens private and gated repositories
LARGE = (".safetensors", ".bin", ".model")  # endings of the files that are stored as large objects
MAPPED = 1 << 26  # bytes from which on a file is neither read nor hashed: stand-ins of real weights are holes


class File:
    """The bytes of one file and the names that git and the large-file storage have for them.

    The names of a mapped file are made from its size and its first mebibyte only.
    """

    def __init__(self, path: str, data: bytes | mmap.mmap) -> None:
        self.data, self.large = data, path.endswith(LARGE)
        content = data if isinstance(data, bytes) else data[: 1 << 20]
        self.oid = hashlib.sha1(b"blob %d\0" % len(data) + content).hexdigest()
        self.sha256 = hashlib.sha256(content if isinstance(data, bytes) else b"%d" % len(data) + content).hexdigest()

    @classmethod
    def read(cls, path: Path) -> "File":
        if path.stat().st_size < MAPPED:
            return cls(path.name, path.read_bytes())
        with path.open("rb") as file:
            return cls(path.name, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def lfs(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "size": len(self.data), "pointerSize": 134}


@dataclass
class Repo:
    gated: bool = False
    private: bool = False
    storage: bool = False  # large files lie elsewhere, behind a redirect to a signed address
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """What goes wrong with requests whose path contains `part`; `times` None is always."""

    part: str
    method: str = "GET"
    times: int | None = None
    status: int | None = None  # answer with this error
    delay: float = 0.0  # seconds before the answer
    cut: int | None = None  # promise everything, send this many bytes, close the connection
    short: int | None = None  # promise and send only this many bytes
    body: bytes | None = None  # answer with this page instead
    whole: bool = False  # ignore the range that was asked for


@dataclass(frozen=True)
class Request:
    """One answered request. `sent` counts the bytes of the body, `token` tells whether one was shown."""

    method: str
    path: str
    status: int
    sent: int
    token: bool


class Server(ThreadingHTTPServer):
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients may leave
            super().handle_error(request, client_address)


class HubServer:
    """The server, running inside its `with` block. `storage_url` is a second address, where signed links point."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.connections: list[socket.socket] = []
        self.closing = threading.Event()
        self.lock = threading.Lock()
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
        return self.commit(repo, revision, files)

    def commit(self, repo: Repo, revision: str, files: dict[str, File]) -> str:
        listing = json.dumps([[path, file.sha256] for path, file in sorted(files.items())])
        commit = hashlib.sha1(listing.encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs[revision] = commit
        return commit

    def fault(self, part: str, **kind: Any) -> None:
        self.faults.append(Fault(part, **kind))

    def take_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.part in path and fault.method == method and fault.times != 0:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return Fault("")

    def count(self, part: str = "", method: str = "") -> int:
        """Answered requests whose path contains `part`."""
        return sum(part in r.path and method in r.method for r in self.requests)

    def sent(self, part: str = "") -> int:
        """Bytes of bodies sent for paths that contain `part`; for a redirected file, its storage path has its name."""
        return sum(r.sent for r in self.requests if part in r.path)


class Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        self.broken = self.hub.take_fault(self.command, unquote(path))
        self.hub.closing.wait(self.broken.delay)
        if self.broken.body is not None:
            return self.answer(200, self.broken.body, {"Content-Type": "text/html"})
        if self.broken.status is not None:
            return self.refuse(self.broken.status, "")
        for method, pattern, action in ROUTES:
            if self.command in method.split() and (match := pattern.fullmatch(path)):
                return action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        return self.refuse(404, "")

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization")

    def open_repo(self, repo: str) -> Repo | None:
        """The repository, or None after an answer that there is none for this user."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.token != f"Bearer {TOKEN}"):
            self.refuse(404 if self.token else 401, "RepoNotFound")
            return None
        return found

    def open_commit(self, repo: str, revision: str) -> tuple[Repo, str, dict[str, File]] | None:
        found = self.open_repo(repo)
        if found is None:
            return None
        commit = found.refs.get(revision, revision)
        if commit not in found.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return found, commit, found.commits[commit]

    def model_info(self, repo: str, revision: str | None = None) -> None:
        if opened := self.open_commit(repo, revision or "main"):
            found, commit, files = opened
            siblings = []
            for path, file in files.items():
                sibling: dict[str, Any] = {"rfilename": path}
                if "blobs=" in self.path:
                    sibling |= {"size": len(file.data), "blobId": file.oid}
                    sibling |= {"lfs": file.lfs()} if file.large else {}
                siblings.append(sibling)
            gated = "manual" if found.gated else False
            self.answer_json(
                {"_id": commit[:24], "id": repo, "sha": commit, "private": found.private, "gated": gated}
                | {"tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
            )

    def tree(self, repo: str, revision: str) -> None:
        if opened := self.open_commit(repo, revision):
            entries = []
            for path, file in opened[2].items():
                entry: dict[str, Any] = {"type": "file", "oid": file.oid, "size": len(file.data), "path": path}
                if file.large:
                    entry["lfs"] = file.lfs() | {"oid": file.sha256}
                entries.append(entry)
            self.answer_json(entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        opened = self.open_commit(repo, revision)
        if opened is None:
            return None
        found, commit, files = opened
        if found.gated and self.token != f"Bearer {TOKEN}":
            return self.refuse(403 if self.token else 401, "GatedRepo")
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            return self.refuse(404, "EntryNotFound", headers)
        file = files[path]
        etag = f'"{file.sha256 if file.large else file.oid}"'
        headers |= {"ETag": etag}
        if file.large:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(file.data))}
        if file.large and found.storage:
            signed = f"{self.hub.storage_url}/storage/{repo}/{commit}/{path}?X-Signature={file.sha256[:16]}"
            return self.answer(302, b"", headers | {"Location": signed})
        self.answer_file(file.data, headers)

    def storage(self, repo: str, commit: str, path: str) -> None:
        file = self.hub.repos[repo].commits[commit][path]
        if self.token or f"X-Signature={file.sha256[:16]}" not in self.path:
            return self.refuse(400, "")  # as object stores do when there are two ways to be authorised, or none
        self.answer_file(file.data, {"ETag": '"storage"'})

    def answer_file(self, data: bytes | mmap.mmap, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.broken.whole:
            return self.answer(200, data, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        if start >= stop:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
        self.answer(206, data[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        names = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self.answer(status, b"", names | (headers or {}))

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes | mmap.mmap, headers: dict[str, str]) -> None:
        if self.broken.short is not None:
            body = body[: self.broken.short]
        length = len(body)
        if self.command == "HEAD":
            body = b""
        elif self.broken.cut is not None:
            body, self.close_connection = body[: self.broken.cut], True
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        # Recorded before it is sent: a client that has its answer finds it in the record.
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, status, len(body), bool(self.token)))
        try:
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the client has had enough
            self.close_connection = True


# One row per call: methods, path, action. The first row that fits answers.
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = [
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)/revision/(?P<revision>[^/]+)"), Handler.model_info),
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)/tree/(?P<revision>[^/]+)"), Handler.tree),
    ("GET", re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)"), Handler.model_info),
    ("GET HEAD", re.compile(r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"), Handler.resolve),
    ("GET", re.compile(r"/storage/(?P<repo>.+)/(?P<commit>[0-9a-f]{40})/(?P<path>.+)"), Handler.storage),
]


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
