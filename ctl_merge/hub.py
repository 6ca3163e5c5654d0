"""The Hub, for reading: resolve, ranges of bytes, download.

A revision is pinned to its commit once, by `resolve`; everything after that asks for the commit, so a branch that moves
while a merge is planned or runs changes nothing. Files come through huggingface_hub and lie in its cache. Where the Hub
cannot be reached, what the cache holds of the revision stands in for it.

Every failure that the user can do something about is a HubError.
"""

import glob
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path

from ctl_merge.errors import HubError
from ctl_merge.hub_client import limit_silence
from ctl_merge.hub_content import differing
from ctl_merge.hub_errors import NO_HUB, explain, failures, out_of_reach
from ctl_merge.sizes import format_size

logger = logging.getLogger("ctl_merge")

TRIES = 3  # of one range request

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
UNSAFE_PATH = re.compile(r"[\x00-\x1f\x7f]|(^|/)\.{0,2}(/|$)")  # control characters, an absolute path, "..", "//"
UNSAFE_REVISION = re.compile(UNSAFE_PATH.pattern + r"|\.\.|[\s~^:?*\[\\]")  # git allows none of these in a name either


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: its size in bytes and, for large files, the sha256 that the Hub publishes; `blob` is
    what git calls the content.
    """

    path: str
    size: int
    sha256: str | None
    blob: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class HubSnapshot:
    """A repository at a commit. `folder` is set when the local cache stands in for a Hub out of reach; then `files` are
    those in the cache, which may be fewer than the repository has.
    """

    repo_id: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    folder: Path | None

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"

    def file(self, path: str) -> HubFile:
        """The file at this path; HubError if the snapshot has none."""
        for file in self.files:
            if file.path == path:
                return file
        if self.folder is not None:
            problem = "not in the local cache, and the Hub is out of reach. Run again with a connection."
        else:
            page = f"https://huggingface.co/{self.repo_id}/tree/{self.commit}"
            problem = f"the repository has no such file. See what it has at {page}."
        raise HubError(f"{self}, {path}: {problem}")


_pins: ContextVar[Mapping[tuple[str, str], str]] = ContextVar("pins", default={})  # noqa: B039


@contextmanager
def pinned(commits: Mapping[tuple[str, str], str]) -> Iterator[None]:
    """Within, `resolve` takes a repository's revision to be the commit that stands here, wherever a branch is now."""
    token = _pins.set(commits)
    try:
        yield
    finally:
        _pins.reset(token)


def resolve(repo_id: str, revision: str | None = None) -> HubSnapshot:
    """Pin a branch, tag or commit (default "main") to its commit and list the files there, in one request.

    HubError if there is no such repository or revision, or if the Hub cannot be reached and the cache has no copy.
    """
    revision = revision or "main"
    check_names(repo_id, revision)
    where = f"{repo_id}@{revision}"
    commit = _pins.get().get((repo_id, revision), revision)
    try:
        return replace(listing(repo_id, commit), revision=revision)
    except failures() as error:
        if out_of_reach(error) and (snapshot := _from_cache(repo_id, commit)):
            logger.warning("%s: the Hub is out of reach; the local cache has commit %s", where, snapshot.commit)
            return replace(snapshot, revision=revision)
        raise HubError(f"{where}: {explain(error, repo_id)}") from error


def listing(repo_id: str, revision: str) -> HubSnapshot:
    """The repository as the Hub has it now. Raises what the client raises, and HubError where it is no Hub's answer."""
    from huggingface_hub import HfApi, constants

    limit_silence()
    where = f"{repo_id}@{revision}"
    info = HfApi().model_info(
        repo_id, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    if not COMMIT.fullmatch(str(info.sha)):
        raise HubError(f"{where}: {NO_HUB}")
    files = []
    for sibling in info.siblings or []:
        path, lfs = sibling.rfilename, sibling.lfs
        size = lfs.size if lfs else sibling.size
        if size is None or UNSAFE_PATH.search(path):
            problem = "has no size" if size is None else "is not a path inside the repository"
            raise HubError(f"{where}, {path!r}: this file {problem}. Tell the owner of the repository.")
        files.append(HubFile(path, size, lfs.sha256 if lfs else None, sibling.blob_id))
    return HubSnapshot(repo_id, revision, str(info.sha), tuple(files), None)


def read_range(snapshot: HubSnapshot, path: str, start: int, stop: int) -> bytes:
    """Bytes start to stop (exclusive) of a file, from the cache where it lies there, else by one ranged request.

    Exactly stop - start bytes come back; HubError if the file ends before, or the transfer does.
    """
    size = snapshot.file(path).size
    if not 0 <= start <= stop <= size:
        raise HubError(f"{snapshot}, {path}: bytes {start} to {stop} were asked for, but the file has {size}.")
    if start == stop:
        return b""
    try:
        if cached(snapshot, [path]) and (folder := _folder(snapshot)):
            with open(folder / path, "rb") as file:
                file.seek(start)
                data = file.read(stop - start)
        else:
            data = _request_range(snapshot, path, start, stop)
    except failures() as error:
        raise HubError(f"{snapshot}, {path}: {explain(error, snapshot.repo_id)}") from error
    if len(data) != stop - start:
        raise HubError(f"{snapshot}, {path}: {len(data)} bytes came instead of {stop - start}. Run again.")
    return data


def cached(snapshot: HubSnapshot, paths: Iterable[str]) -> set[str]:
    """Those of the paths that lie complete in the local cache at this commit. No request is made.

    HubError if the snapshot has no such file.
    """
    sizes = {path: snapshot.file(path).size for path in paths}
    folder = _folder(snapshot)
    return {path for path, size in sizes.items() if folder and _size(folder / path) == size}


def download(snapshot: HubSnapshot, paths: Iterable[str]) -> Path:
    """Bring these files into the local cache, those only, and return the folder of the snapshot, where they lie.

    HubError if a file is missing, the transfer fails, or a file does not have its published size and sha256. Files that
    arrived whole stay in the cache, so a further run fetches only the rest.
    """
    from huggingface_hub import snapshot_download

    limit_silence()
    wanted = {path: snapshot.file(path).size for path in paths}
    missing = sorted(wanted.keys() - cached(snapshot, wanted))
    folder = _folder(snapshot)
    if missing or folder is None:
        patterns = [glob.escape(path) for path in missing]
        try:
            folder = Path(snapshot_download(snapshot.repo_id, revision=snapshot.commit, allow_patterns=patterns))
        except failures() as error:
            left = sorted(set(missing) - cached(snapshot, missing)) or missing
            where = ", ".join([str(snapshot), *left[:1]]) + (f" and {len(left) - 1} more" if len(left) > 1 else "")
            raise HubError(f"{where}: {explain(error, snapshot.repo_id)}") from error
    for path, size in wanted.items():
        found = _size(folder / path)
        if found is None:
            raise HubError(f"{snapshot}, {path}: the Hub lists this file but did not send it. Run again.")
        if found != size:
            raise HubError(
                f"{snapshot}, {path}: {found} bytes in the local cache, where the Hub has {size}. Delete "
                f"{folder / path} and the file it links to, then run again."
            )
    published = [(path, sha256) for path in wanted if (sha256 := snapshot.file(path).sha256)]
    for path, expected, actual in differing(folder, published):
        raise HubError(
            f"{snapshot}, {path}: the file in the local cache has the sha256 {actual}, where the Hub has published "
            f"{expected}. Delete {folder / path} and the file it links to, then run again."
        )
    _note_revision(snapshot, folder)
    return folder


def check_space(needed: int) -> None:
    """Refuse a download of `needed` bytes that the cache's disk cannot take. Raises HubError."""
    if not needed:
        return
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(place for place in (cache, *cache.parents) if place.exists())).free
    if free < needed:
        raise HubError(
            f"{format_size(needed)} are to be downloaded into {cache}, and its disk has {format_size(free)} left. "
            "Free space, or set HF_HUB_CACHE to another disk."
        )


def check_names(repo_id: str, revision: str) -> None:
    """Refuse names that no repository or revision can have. Raises HubError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if UNSAFE_PATH.search(repo_id):  # huggingface_hub 1 lets a newline at the end pass
            raise HFValidationError
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot be a repository on the Hub: those are org/name in letters, digits, '-', '_' and '.', "
            "without '--' and '..'. Check the spelling."
        ) from error
    if UNSAFE_REVISION.search(revision):
        raise HubError(f"{repo_id}: {revision!r} cannot be a branch, a tag or a commit. Check the spelling.")


def _request_range(snapshot: HubSnapshot, path: str, start: int, stop: int) -> bytes:
    """At most stop - start bytes: fewer if the server sends fewer."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(snapshot.repo_id, path, revision=snapshot.commit)
    headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    attempt = 1
    while True:
        try:
            # This waits out "too many requests" and 5xx. Lost connections are left to the loop: the block would be
            # entered twice if it raised what http_stream_backoff retries on.
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=timeout, max_retries=TRIES - 1, retry_on_exceptions=()
            ) as response:
                hf_raise_for_status(response)
                # A server may ignore the range and send the whole file: read no more of it than is needed.
                skip = 0 if response.status_code == 206 else start
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if len(data) >= skip + stop - start:
                        break
                return bytes(data[skip : skip + stop - start])
        except HTTPError as error:
            if isinstance(error, HfHubHTTPError) or attempt == TRIES:
                raise
            time.sleep(attempt)
            attempt += 1


def _size(path: Path) -> int | None:
    return path.stat().st_size if os.path.isfile(path) else None


def _folder(snapshot: HubSnapshot) -> Path | None:
    return snapshot.folder or _cached_folder(snapshot.repo_id, snapshot.commit)


def _cached_folder(repo_id: str, revision: str) -> Path | None:
    """The folder of this revision in huggingface_hub's cache, if there is one. It need not be complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # asking for no file at all keeps the client from calling an incomplete folder an error
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None


def _from_cache(repo_id: str, revision: str) -> HubSnapshot | None:
    folder = _cached_folder(repo_id, revision)
    if folder is None:
        return None
    files = []
    for path in sorted(folder.rglob("*")):
        if (size := _size(path)) is not None:
            # A snapshot links to blobs, and the cache names those of large files by their sha256.
            blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            sha256 = blob if SHA256.fullmatch(blob) else None
            files.append(HubFile(path.relative_to(folder).as_posix(), size, sha256))
    return HubSnapshot(repo_id, revision, folder.name, tuple(files), folder) if files else None


def _note_revision(snapshot: HubSnapshot, folder: Path) -> None:
    """Note in the cache which commit the revision is, so that it is known offline: the client does so only for
    downloads that are not pinned.
    """
    if snapshot.revision == snapshot.commit or snapshot.folder is not None:
        return
    ref = folder.parent.parent / "refs" / snapshot.revision
    partial = ref.with_name(f"{ref.name}.{os.getpid()}.incomplete")
    try:
        ref.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(snapshot.commit)
        partial.replace(ref)
    except OSError as error:  # a cache that cannot be written still serves what it has
        logger.debug("%s: cannot note the commit in the cache: %s", snapshot, error)
