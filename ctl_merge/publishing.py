"""A folder to the Hub: checked, compared, pushed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctl_merge.destination import Destination, check_rights, look
from ctl_merge.errors import HubError, OutputError
from ctl_merge.finished import is_stale, read_finished
from ctl_merge.hub_push import Difference, Push, Pushed
from ctl_merge.shard_stream import ShardStream


def destination(
    repository: str, private: bool | None = None, revision: str = "main", create_pr: bool = False,
    message: str | None = None,
) -> Destination:  # fmt: skip
    """Where a push goes, as the options of the command line say it."""
    own = {"message": message} if message and message.strip() else {}
    return Destination(repository, revision, private, create_pr, **own)


def push(folder: Path, to: Destination, *, checked: bool = False) -> Pushed:
    """Push a finished folder in one commit. `checked`: the rights were checked before, in this run.

    Raises OutputError for a folder that is not whole, HubError for what the Hub refuses; the folder stays as it is.
    """
    files = read_finished(folder)
    push = Push(to if checked else check_rights(to))
    for file in files:
        push.add(file)
    return push.commit(is_stale)


class Upload:
    """A push that ends a merge: rights are checked when it is made, before the work starts.

    With `streamed`, `stream` takes the shards away during the merge. Raises HubError.
    """

    def __init__(self, to: Destination, streamed: bool = False) -> None:
        self.asked, self.to = to, check_rights(to)
        self.stream = ShardStream(Push(self.to)) if streamed else None

    def finish(self, folder: Path) -> Pushed:
        """Push the merge in the folder, which stays whatever happens. Raises HubError with the command that goes on."""
        if self.stream and self.stream.pushed:
            return self.stream.pushed
        try:
            return push(folder, self.to, checked=True)
        except (HubError, OutputError) as error:
            raise type(error)(
                f"{error}\nThe merge is whole, in {folder}. This goes on: {command(folder, self.asked)}"
            ) from error


def compare(folder: Path, to: Destination) -> dict[str, Any]:
    """What `push` would send, leave and remove, as plain data; nothing is changed. Raises as `push` does."""
    files = read_finished(folder)
    there = look(to)
    remote = there.files if there else ()
    difference = Difference.of(files, remote, is_stale)
    stale = [{"file": file.path, "bytes": file.size} for file in remote if file.path in difference.stale]
    listed = {True: [], False: []}  # type: dict[bool, list[dict[str, Any]]]
    for file in files:
        listed[file.path in difference.missing].append({"file": file.path, "bytes": file.size})
    return {
        "folder": str(folder), "destination": str(to), "exists": there is not None,
        "send": listed[True], "unchanged": listed[False], "remove": stale,
    }  # fmt: skip


def command(folder: Path, to: Destination) -> str:
    """The command that pushes this folder to there."""
    import shlex

    options = [("--revision", to.revision)] if to.revision != "main" else []
    words = ["ctl-merge", "push", str(folder), to.repo_id, *(word for pair in options for word in pair)]
    if to.private is not None:
        words.append("--private" if to.private else "--no-private")
    words += ["--create-pr"] * to.create_pr
    if to.message != Destination.message:
        words += ["--commit-message", to.message]
    return shlex.join(words)
