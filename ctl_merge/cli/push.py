"""`ctl-merge push`: a finished merge goes to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ctl_merge.cli.arguments import JsonFlag
from ctl_merge.cli.terminal import configure, print_json, print_table, say

PrivateFlag = Annotated[
    bool | None, typer.Option("--private/--no-private", help="Of a repository that is created.", show_default=False)
]
RevisionOption = Annotated[str, typer.Option(help="Branch to push to; made where there is none.", metavar="BRANCH")]
PullRequestFlag = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
MessageOption = Annotated[str | None, typer.Option(help="Title of the commit or pull request.", metavar="TEXT")]


def push(
    folder: Annotated[Path, typer.Argument(help="A merge, or an adapter.", metavar="FOLDER")],
    repository: Annotated[str, typer.Argument(help="org/name on the Hub.", metavar="REPOSITORY")],
    private: PrivateFlag = None,
    revision: RevisionOption = "main",
    create_pr: PullRequestFlag = False,
    commit_message: MessageOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent and removed, and stop.")] = False,
    as_json: JsonFlag = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")] = False,
) -> None:
    """Push a merge to the Hub in one commit; nothing is sent twice. Log in before: `hf auth login`, or HF_TOKEN."""
    configure(verbose, quiet)
    from ctl_merge import publishing

    destination = publishing.destination(repository, private, revision, create_pr, commit_message)
    if dry_run:
        found = publishing.compare(folder, destination)
        if as_json:
            print_json(found)
        else:
            print_table(_difference(found))
        return
    pushed = publishing.push(folder, destination)
    if as_json:
        print_json(pushed.data)
    elif not quiet:
        say(pushed)


def _difference(found: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ctl_merge.sizes import format_size

    table = Table(title=f"{found['folder']} → {found['destination']}", title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("what happens")
    for kind, what in (("send", "sent"), ("unchanged", "there already"), ("remove", "removed: of an earlier push")):
        for entry in found[kind]:
            table.add_row(Text(entry["file"]), format_size(entry["bytes"]), what)
    return table
