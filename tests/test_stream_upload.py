"""Merges that are pushed as they are made, whole at the end or shard by shard."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, HubServer, hub_environment
from pushes import REPO, SHARD_SIZE, SHARDS, commits, contents, remote, to, write_recipe

from ctl_merge import cli
from ctl_merge.errors import CtlMergeError, HubError
from ctl_merge.hub_push import Pushed
from ctl_merge.merging import Merge
from ctl_merge.publishing import Upload

ROOT = Path(cli.__file__).parents[2]
NAMES = [f"model-{i:05}-of-{SHARDS:05}.safetensors" for i in range(1, SHARDS + 1)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


@pytest.fixture
def plain(recipe: Path) -> dict[str, bytes]:
    """What the same merge writes without a push."""
    return contents(Merge(recipe, max_shard_size=SHARD_SIZE).write(recipe.parent / "plain" / "merged").folder)


def stream(recipe: Path, resume: bool = False, **options: Any) -> Pushed:
    upload = Upload(to(**options), streamed=True)
    merge = Merge(recipe, max_shard_size=SHARD_SIZE, num_workers=2)
    return upload.finish(merge.write(recipe.parent / "merged", resume=resume, stream=upload.stream).folder)


def small(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name not in NAMES}


def puts(hub: HubServer) -> int:
    return sum(r.method == "PUT" and r.status == 200 for r in hub.requests)


def test_it_ends_as_a_merge_that_is_pushed_whole(hub: HubServer, recipe: Path, plain: dict[str, bytes]) -> None:
    folder, held = recipe.parent / "merged.partial", []
    hub.fault(
        "/upload/", method="PUT", action=lambda: held.append(sum(p.stat().st_size for p in folder.glob("model-*")))
    )
    pushed = stream(recipe)
    assert remote(hub) == plain and commits(hub) == 1
    assert set(pushed.sent) == set(plain)
    assert contents(recipe.parent / "merged") == small(plain)  # all but the weights stays
    assert len(held) == SHARDS and max(held) <= 2 * len(plain[NAMES[0]]) + 10_000  # the index
    assert not folder.exists()


def test_a_second_time_nothing_is_sent(hub: HubServer, recipe: Path) -> None:
    first, sent = stream(recipe), puts(hub)
    upload = Upload(to(), streamed=True)
    Merge(recipe, max_shard_size=SHARD_SIZE).write(recipe.parent / "merged", overwrite=True, stream=upload.stream)
    assert upload.stream and upload.stream.pushed and not upload.stream.pushed.changed
    assert (commits(hub), puts(hub), hub.repos[REPO].refs["main"]) == (1, sent, first.commit)


def test_a_pull_request(hub: HubServer, recipe: Path, plain: dict[str, bytes]) -> None:
    assert stream(recipe, create_pr=True).pull_request
    assert remote(hub, "refs/pr/1") == plain and remote(hub) == {}


FAULTS = {
    "upload": ("PUT", "/upload/"), "batch": ("POST", "/lfs/objects/batch"), "verify": ("POST", "/lfs/verify"),
    "preupload": ("POST", "/preupload/"), "commit": ("POST", "/commit/"), "card": ("POST", "/api/validate-yaml"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [{"status": 503}, {"status": 429}, {"lost": True}, {"delay": 0.1}, {"cut": 1000}])
@pytest.mark.parametrize("step", FAULTS)
def test_a_passing_failure_is_waited_out(
    hub: HubServer, recipe: Path, plain: dict[str, bytes], step: str, kind: dict[str, Any]
) -> None:
    method, part = FAULTS[step]
    hub.fault(part, method=method, times=1, after=step == "preupload", **kind)
    stream(recipe)
    assert remote(hub) == plain and commits(hub) == 1


@pytest.mark.parametrize(
    ("step", "status"), [*((s, 500) for s in FAULTS), ("upload", 403), ("commit", 401), ("commit", 404)]
)
def test_a_lasting_failure_loses_nothing(
    hub: HubServer, recipe: Path, plain: dict[str, bytes], step: str, status: int
) -> None:
    method, part = FAULTS[step]
    hub.fault(part, method=method, status=status, after=1 if step in ("upload", "batch", "verify", "preupload") else 0)
    with pytest.raises(HubError):
        stream(recipe)
    assert remote(hub) == {} and commits(hub) == 0
    assert not (recipe.parent / "merged").exists() and (recipe.parent / "merged.partial").exists()
    hub.faults.clear()
    stream(recipe, resume=True)
    assert remote(hub) == plain and commits(hub) == 1
    assert puts(hub) == SHARDS  # none was sent again


def test_a_lost_answer_to_the_commit(hub: HubServer, recipe: Path, plain: dict[str, bytes]) -> None:
    hub.fault("/commit/", method="POST", lost=True)
    assert stream(recipe).changed
    assert remote(hub) == plain and commits(hub) == 1


def test_what_the_hub_has_cleared_away_is_made_again(hub: HubServer, recipe: Path, plain: dict[str, bytes]) -> None:
    hub.fault("/commit/", method="POST", status=403)
    with pytest.raises(HubError):
        stream(recipe)
    hub.faults.clear()
    del hub.repos[REPO].objects[next(iter(hub.repos[REPO].objects))]
    stream(recipe, resume=True)
    assert remote(hub) == plain and puts(hub) == SHARDS + 1


def test_going_on_without_the_stream_writes_the_weights_here(
    hub: HubServer, recipe: Path, plain: dict[str, bytes]
) -> None:
    hub.fault("/commit/", method="POST", status=403)
    with pytest.raises(HubError):
        stream(recipe)
    Merge(recipe, max_shard_size=SHARD_SIZE).write(recipe.parent / "merged", resume=True)
    assert contents(recipe.parent / "merged") == plain


def test_a_kill_in_the_middle(hub: HubServer, recipe: Path, plain: dict[str, bytes], tmp_path: Path) -> None:
    hub.fault("/upload/", method="PUT", after=1, delay=60.0)  # the second shard hangs
    words = ["merge", recipe, "-o", tmp_path / "merged", "--max-shard-size", SHARD_SIZE, "--push-to-hub", REPO,
             "--stream-upload"]  # fmt: skip
    environment = hub_environment(hub, tmp_path) | {"HF_TOKEN": TOKEN}
    process = subprocess.Popen([sys.executable, "-m", "ctl_merge", *map(str, words)], env=environment, cwd=ROOT)
    journal = tmp_path / "merged.partial" / "uploaded"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_text()) and time.monotonic() < deadline:
        threading.Event().wait(0.05)  # the fixture has taken the seconds out of time.sleep
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [json.loads(line)[0] for line in journal.read_text().splitlines()] == NAMES[:1]
    hub.faults.clear()
    stream(recipe, resume=True)
    assert remote(hub) == plain and commits(hub) == 1
    first = next(iter(hub.repos[REPO].objects))
    assert sum(r.method == "PUT" and first in r.path for r in hub.requests) == 1


# ---- the command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ctl-merge", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


def test_merge_and_push(hub: HubServer, recipe: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run(recipe, "-o", tmp_path / "merged", "--push-to-hub", REPO, "--private")
    assert code == 0 and out.endswith(f"→ {hub.url}/{REPO}/tree/{hub.repos[REPO].refs['main']}\n")
    assert remote(hub) == contents(tmp_path / "merged") and hub.repos[REPO].private
    code, out, _ = run(
        recipe, "-o", tmp_path / "again", "--push-to-hub", REPO, "--create-pr", "--stream-upload", "--json"
    )
    assert code == 0 and json.loads(out)["pushed"]["pull_request"].endswith("/discussions/1")


def test_rights_are_checked_before_the_merge(hub: HubServer, recipe: Path, tmp_path: Path, run: Run) -> None:
    hub.user.orgs = {}
    code, _, err = run(recipe, "-o", tmp_path / "merged", "--push-to-hub", REPO)
    assert code == 2 and "may not write there" in err
    assert not list(tmp_path.glob("merged*"))


def test_a_failed_push_leaves_the_merge_and_says_how_to_go_on(
    hub: HubServer, recipe: Path, tmp_path: Path, run: Run
) -> None:
    hub.fault("/commit/", method="POST", status=403)
    name = "a b's.safe"
    code, _, err = run(
        recipe, "-o", tmp_path / name, "--push-to-hub", REPO, "--revision", "v1", "--commit-message", "it's"
    )
    assert code == 2 and f"The merge is whole, in {tmp_path / name}. This goes on: ctl-merge push" in err
    hub.faults.clear()
    words = shlex.split(err.strip().rpartition("goes on: ctl-merge ")[2])
    assert run(*words)[0] == 0
    assert remote(hub, "v1") == contents(tmp_path / name) and hub.repos[REPO].log[-1][2] == "it's"


@pytest.mark.parametrize("option", [["--private"], ["--create-pr"], ["--stream-upload"], ["--revision", "x"]])
def test_options_of_a_push_without_one(recipe: Path, run: Run, option: list[str]) -> None:
    code, _, err = run(recipe, *option)
    assert code == 2 and "--push-to-hub" in err


def test_the_plan_asks_nothing(hub: HubServer, recipe: Path, run: Run) -> None:
    assert run(recipe, "--dry-run", "--push-to-hub", REPO)[0] == 0
    assert not hub.requests


def test_a_full_name_is_needed_for_nothing_else(hub: HubServer, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(CtlMergeError, match="cannot be a repository"):
        Upload(to("a/b/c"))
