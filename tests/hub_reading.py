"""The loopback Hub's reading side: listings, files, ranges."""

import mmap
import re
from typing import TYPE_CHECKING, Any

from hub_store import TOKEN, File, Repo

if TYPE_CHECKING:
    from hub_server import Handler as Base
else:
    Base = object


class Reading(Base):
    """Answers to GET and HEAD."""

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


ROUTES = [
    ("GET", r"/api/models/(?P<repo>[^/]+(/[^/]+)?)/revision/(?P<revision>[^/]+)", Reading.model_info),
    ("GET", r"/api/models/(?P<repo>[^/]+(/[^/]+)?)/tree/(?P<revision>[^/]+)", Reading.tree),
    ("GET", r"/api/models/(?P<repo>[^/]+(/[^/]+)?)", Reading.model_info),
    ("GET HEAD", r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Reading.resolve),
    ("GET", r"/storage/(?P<repo>.+)/(?P<commit>[0-9a-f]{40})/(?P<path>.+)", Reading.storage),
]
