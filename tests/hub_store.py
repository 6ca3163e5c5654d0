"""What the loopback Hub holds: files, repositories, the user who pushes."""

import hashlib
import json
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_loopbackToken"  # opens private and gated repositories, and may write
LARGE = (".safetensors", ".bin", ".model")  # endings of the files that are stored as large objects
MAPPED = 1 << 26  # bytes from which on a file is neither read nor hashed: stand-ins of real weights are holes


class File:
    """The bytes of one file and the names that git and the large-file storage have for them.

    The names of a mapped file are made from its size and its first mebibyte only.
    """

    def __init__(self, path: str, data: bytes | mmap.mmap) -> None:
        self.path, self.data, self.large = path, data, path.endswith(LARGE)
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
    objects: dict[str, bytes] = field(default_factory=dict)  # large objects that were uploaded, by sha256
    log: list[tuple[str, str, str]] = field(default_factory=list)  # of every commit: the ref, the commit, the message

    def commit(self, revision: str, files: dict[str, File], parent: str = "", message: str = "") -> str:
        """A commit of these files, to which the ref then points."""
        listing = json.dumps([[path, file.sha256] for path, file in sorted(files.items())] + [parent] * bool(parent))
        commit = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[revision] = commit
        self.log.append((revision, commit, message))
        return commit

    def head(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.refs[revision]]

    @property
    def pull_requests(self) -> list[tuple[int, str]]:
        """Number and title of each, the newest first."""
        titles = {ref: message for ref, _, message in reversed(self.log)}
        found = [(int(ref.removeprefix("refs/pr/")), titles[ref]) for ref in self.refs if ref.startswith("refs/pr/")]
        return sorted(found, reverse=True)


@dataclass
class User:
    """Whom the token stands for: the organisations with a role in each, and what the token may do."""

    name: str = "me"
    orgs: dict[str, str] = field(default_factory=lambda: {"org": "write", "readers": "read"})
    token_role: str = "write"

    def may_write(self, namespace: str) -> bool:
        role = "admin" if namespace == self.name else self.orgs.get(namespace, "read")
        return self.token_role != "read" and role in ("write", "admin")
