"""Shards that leave for the Hub as they are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ctl_merge.digests import sha256_of
from ctl_merge.finished import is_stale, public_files
from ctl_merge.hub_push import Outgoing, Push, Pushed, stored_there
from ctl_merge.output import UPLOADED

if TYPE_CHECKING:
    from ctl_merge.writer import Shard


class ShardStream:
    """Uploads each shard, notes it in a journal in the working folder, deletes it there; one commit ends it all.

    The journal has a line `[file, bytes, sha256]` for each shard that the Hub has. A later run asks the Hub whether it
    still keeps them: what was never committed is cleared away there after a while.
    """

    def __init__(self, push: Push) -> None:
        self.push = push
        self.sent: dict[str, Outgoing] = {}
        self.pushed: Pushed | None = None

    def begin(self, folder: Path, shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
        """The shards that are still to be written. Raises HubError."""
        self.folder = folder
        names = {shard.file for shard in shards}
        there = stored_there(self.push.destination, [file for file in self._journaled() if file.path in names])
        for file in there:
            self._gone(file)
        (folder / UPLOADED).write_text("".join(map(_line, there)), "utf-8")
        return tuple(shard for shard in shards if shard.file not in self.sent)

    def send(self, shard: Shard) -> None:
        """Upload a finished shard and delete it. Raises HubError; the shard then stays."""
        path = self.folder / shard.file
        file = Outgoing(shard.file, path.stat().st_size, sha256_of(path), path)
        self.push.add(file)
        self.push.send([shard.file])
        if self.push.is_kept(shard.file):  # else it is so small that it goes with the commit
            with (self.folder / UPLOADED).open("a", encoding="utf-8") as journal:
                journal.write(_line(file))
                journal.flush()
                os.fsync(journal.fileno())
            self._gone(replace(file, source=None))

    def _gone(self, file: Outgoing) -> None:
        self.sent[file.path] = file
        self.push.add(file)
        (self.folder / file.path).unlink(missing_ok=True)

    def commit(self) -> None:
        """Everything in the folder, and the shards that were sent, as one commit. Raises HubError."""
        for file in public_files(self.folder):
            self.push.add(file)
        self.pushed = self.push.commit(is_stale)

    def _journaled(self) -> Iterator[Outgoing]:
        path = self.folder / UPLOADED
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                name, size, digest = json.loads(line)
            except (ValueError, TypeError):
                continue  # the last line of a run that was killed while writing it
            yield Outgoing(name, size, digest, None)


def _line(file: Outgoing) -> str:
    return json.dumps([file.path, file.size, file.sha256]) + "\n"
