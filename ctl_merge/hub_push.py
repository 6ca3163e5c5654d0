"""The Hub, for writing: uploads and one commit.

Large files go first, each on its own, and lie on the Hub without anybody seeing them. One commit then names them all,
adds the small files and removes what is stale: a repository has all of a push or nothing of it. The commit carries the
commit it was planned on, so that a branch that moves is noticed; and where its answer is lost, the branch is looked at
before anything is sent again.

Every failure that the user can do something about is a HubError.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctl_merge.destination import TRIES, Destination, ask
from ctl_merge.errors import HubError
from ctl_merge.hub import HubFile, HubSnapshot, listing
from ctl_merge.hub_errors import explain, failures, may_pass, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


@dataclass(frozen=True)
class Outgoing:
    """A file of the push: its path in the repository, bytes, sha256, and where it lies; None once it was sent."""

    path: str
    size: int
    sha256: str
    source: Path | None

    def is_there(self, remote: HubFile | None) -> bool:
        """Whether the repository's file at this path has the same content."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        return self.source is not None and remote.blob == _git_name(self.source.read_bytes())


@dataclass(frozen=True)
class Pushed:
    """What a push came to: the commit that has it all, its page, and what changed."""

    repo_id: str
    commit: str
    url: str
    sent: tuple[str, ...]
    removed: tuple[str, ...]
    pull_request: str | None = None

    @property
    def changed(self) -> bool:
        return bool(self.sent or self.removed)

    @property
    def data(self) -> dict[str, Any]:
        return asdict(self) | {"changed": self.changed}

    def __str__(self) -> str:
        if not self.changed:
            return f"nothing to push: all of it is there\n→ {self.url}"
        gone = f", {len(self.removed)} of an earlier push removed" if self.removed else ""
        return f"{len(self.sent)} files sent{gone}, in one commit ({self.commit[:12]})\n→ {self.url}"


@dataclass(frozen=True)
class Difference:
    """What a repository lacks, and what it has too much."""

    missing: tuple[str, ...]
    stale: tuple[str, ...]

    @classmethod
    def of(cls, files: Iterable[Outgoing], there: Iterable[HubFile], is_stale: Callable[[str], bool]) -> Difference:
        """`is_stale`: whether a file of the repository that is not among `files` is to go."""
        remote, local = {file.path: file for file in there}, {file.path: file for file in files}
        missing = tuple(path for path, file in local.items() if not file.is_there(remote.get(path)))
        return cls(missing, tuple(path for path in remote if path not in local and is_stale(path)))

    def __bool__(self) -> bool:
        return bool(self.missing or self.stale)


@dataclass
class Push:
    """Files on their way into one commit at a destination whose rights are checked."""

    destination: Destination
    files: dict[str, Outgoing] = field(default_factory=dict)
    operations: dict[str, CommitOperationAdd] = field(default_factory=dict)

    def add(self, file: Outgoing) -> None:
        """Take a file, or one that the Hub has already, into the commit."""
        self.files[file.path] = file
        self.operations[file.path] = _operation(file)

    def send(self, paths: Sequence[str]) -> None:
        """Upload those of the files that are large; the Hub keeps what it has. Raises HubError."""
        from huggingface_hub import HfApi

        operations = [self.operations[path] for path in paths]
        try:
            HfApi().preupload_lfs_files(
                self.destination.repo_id, operations, revision=self.destination.revision, free_memory=False,
                create_pr=self.destination.create_pr, gitignore_content="",
            )  # fmt: skip
        except failures() as error:
            raise self._error(error) from error

    def is_kept(self, path: str) -> bool:
        """Whether the Hub keeps the file's content already, so that the commit has only to name it."""
        return self.operations[path]._is_uploaded

    def commit(self, is_stale: Callable[[str], bool]) -> Pushed:
        """Send what the repository lacks and make it the repository's content, in one commit; none if nothing differs.

        `is_stale`: whether a file of the repository that is not among these is to be removed. Raises HubError.
        """
        planned: tuple[HubSnapshot, Difference] | None = None
        problem: Exception | None = None
        for attempt in range(TRIES + 1):
            head = self._head(problem)
            difference = Difference.of(self.files.values(), head.files, is_stale)
            if not difference:  # the answer to an earlier try was lost
                return self._pushed(head.commit, planned[1] if planned else difference)
            if self.destination.create_pr and (found := self._pull_request(is_stale)):
                return self._pushed(found[0], planned[1] if planned else Difference((), ()), found[1])
            if planned and _collide(planned[0], head, self.files, planned[1]):
                raise HubError(
                    f"{self.destination} moved during the push (to commit {head.commit[:12]}), in files that the push "
                    "changes: look at it, then run again."
                )
            if problem is not None and attempt == TRIES:
                raise self._error(problem) from problem
            planned = (head, difference)
            self.send(difference.missing)
            try:
                return self._commit(head, difference)
            except failures() as error:
                if status_of(error) not in (0, 409, 412) and not may_pass(error):
                    raise self._error(error) from error
                problem = error
                time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _commit(self, head: HubSnapshot, difference: Difference) -> Pushed:
        from huggingface_hub import CommitOperationDelete, HfApi

        additions = [self.operations[path] for path in difference.missing]
        removals = [CommitOperationDelete(path, is_folder=False) for path in difference.stale]
        done = HfApi().create_commit(
            self.destination.repo_id, [*additions, *removals], commit_message=self.destination.message,
            revision=self.destination.revision, create_pr=self.destination.create_pr, parent_commit=head.commit,
        )  # fmt: skip
        return self._pushed(done.oid, difference, done.pr_url)

    def _head(self, problem: Exception | None) -> HubSnapshot:
        """The branch as it is now. `problem`: of a commit whose answer is not known, if there was one."""
        destination = self.destination
        try:
            return ask(lambda: listing(destination.repo_id, destination.revision), destination.repo_id)
        except HubError as error:
            if problem is None:
                raise
            raise HubError(
                f"{error} Whether the commit arrived is not known: the next push looks, and sends only what is missing."
            ) from problem

    def _pull_request(self, is_stale: Callable[[str], bool]) -> tuple[str, str] | None:
        """Commit and page of an open pull request of the same title that has it all."""
        from huggingface_hub import HfApi

        repo_id = self.destination.repo_id
        requests = ask(
            lambda: list(
                HfApi().get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open")
            ),
            repo_id,
        )
        for request in requests:
            if request.title == self.destination.message and request.git_reference:
                ref = request.git_reference
                head = ask(lambda: listing(repo_id, ref), repo_id)  # noqa: B023
                if not Difference.of(self.files.values(), head.files, is_stale):
                    return head.commit, request.url
        return None

    def _pushed(self, commit: str, difference: Difference, pull_request: str | None = None) -> Pushed:
        from huggingface_hub import constants

        repo_id = self.destination.repo_id
        url = pull_request or f"{constants.ENDPOINT}/{repo_id}/tree/{commit}"
        return Pushed(repo_id, commit, url, difference.missing, difference.stale, pull_request)

    def _error(self, error: Exception) -> HubError:
        return HubError(f"{self.destination}: {explain(error, self.destination.repo_id, writing=True)}")


def stored_there(destination: Destination, files: Iterable[Outgoing]) -> list[Outgoing]:
    """Those of the large files whose content the Hub keeps for this repository, committed or not. Raises HubError."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    files = list(files)
    if not files:
        return []
    asked = [UploadInfo(size=file.size, sample=b"", sha256=bytes.fromhex(file.sha256)) for file in files]
    revision = None if destination.create_pr else destination.revision
    found, _, _ = ask(
        lambda: post_lfs_batch_info(asked, None, "model", destination.repo_id, revision), destination.repo_id
    )
    there = {item["oid"] for item in found if not item.get("actions")}
    return [file for file in files if file.sha256 in there]


def _operation(file: Outgoing) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    if file.source is not None:
        operation = CommitOperationAdd(file.path, file.source)
        operation.upload_info.sha256 = bytes.fromhex(file.sha256)
        return operation
    # The Hub has it: what the client would know after sending it.
    operation = CommitOperationAdd(file.path, b"")
    operation.upload_info.size, operation.upload_info.sha256 = file.size, bytes.fromhex(file.sha256)
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
    return operation


def _collide(before: HubSnapshot, after: HubSnapshot, files: Iterable[str], difference: Difference) -> bool:
    """Whether a file that the push is about changed between two commits of the branch."""
    was, now = ({file.path: (file.sha256, file.blob) for file in s.files} for s in (before, after))
    return any(was.get(path) != now.get(path) for path in {*files, *difference.stale})


def _git_name(data: bytes) -> str:
    """The name of a blob with this content in git."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
