"""Where a push goes, and the right to go there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from ctl_merge.errors import HubError
from ctl_merge.hub import COMMIT, HubSnapshot, check_names, listing
from ctl_merge.hub_client import limit_silence
from ctl_merge.hub_errors import explain, failures, may_pass

TRIES = 4  # of one request, and of a commit
T = TypeVar("T")


@dataclass(frozen=True)
class Destination:
    """Where a push goes. `private` counts where the repository is created; None is the Hub's own default."""

    repo_id: str
    revision: str = "main"
    private: bool | None = None
    create_pr: bool = False
    message: str = "Upload merge with ctl-merge"

    def __str__(self) -> str:
        return self.repo_id if self.revision == "main" else f"{self.repo_id}@{self.revision}"


def check_rights(destination: Destination) -> Destination:
    """Make sure that a push to there can be done, and give the destination with its full name.

    Creates the repository, and the branch where there is none, as that is the only sure way to know; asks whether the
    token may write, without writing. Raises HubError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_names(destination.repo_id, destination.revision)
    if COMMIT.fullmatch(destination.revision):
        raise HubError(f"{destination}: this is a commit, and a push goes to a branch: name one")
    api = HfApi()
    me = ask(api.whoami, destination.repo_id)
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"{destination}: the token may only read. Make one with the role write, and set HF_TOKEN to it.")
    if "/" not in destination.repo_id:
        destination = replace(destination, repo_id=f"{me['name']}/{destination.repo_id}")
    repo_id, revision, request = destination.repo_id, destination.revision, destination.create_pr
    ask(lambda: api.create_repo(repo_id, private=destination.private, exist_ok=True), repo_id)
    is_private = ask(lambda: api.model_info(repo_id), repo_id).private
    if destination.private is not None and is_private is not None and destination.private != is_private:
        kind, option = ("private", "--no-private") if is_private else ("public", "--private")
        raise HubError(f"{repo_id} exists and is {kind}: leave out {option}, or change it in the repository's settings")
    if revision != "main" and not revision.startswith("refs/") and not request:
        ask(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    probe = CommitOperationAdd("README.md", b"#")  # small: the Hub is asked how it would be sent, and it is not sent
    ask(
        lambda: api.preupload_lfs_files(repo_id, [probe], revision=revision, create_pr=request, gitignore_content=""),
        repo_id,
    )
    return destination


def look(destination: Destination) -> HubSnapshot | None:
    """The repository as it is, None if there is none yet, or none of this branch. Raises HubError."""
    check_names(destination.repo_id, destination.revision)
    try:
        return ask(lambda: listing(destination.repo_id, destination.revision), destination.repo_id)
    except HubError as error:
        if type(error.__cause__).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            return None
        raise


def ask(request: Callable[[], T], repo_id: str) -> T:
    """What a request that may be repeated gives; failures that may pass are waited out. Raises HubError."""
    limit_silence()
    for attempt in range(TRIES):
        try:
            return request()
        except failures() as error:
            if attempt == TRIES - 1 or not may_pass(error):
                raise HubError(f"{repo_id}: {explain(error, repo_id, writing=True)}") from error
            time.sleep(2**attempt)
    raise AssertionError("the last attempt returns or raises")
