"""A finished folder on its way to the Hub: whole, once, in one commit. No test leaves the machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hub_server import TOKEN, HubServer, hub_environment
from hub_store import File, Repo
from huggingface_hub import snapshot_download
from pushes import REPO, SHARD_SIZE, commits, contents, remote, to, write_recipe

from ctl_merge import publishing
from ctl_merge.destination import Destination
from ctl_merge.errors import HubError, OutputError
from ctl_merge.hub_push import Pushed
from ctl_merge.merging import Merge

ROOT = Path(publishing.__file__).parent.parent


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("merge")
    return Merge(write_recipe(place), max_shard_size=SHARD_SIZE, num_workers=1).write(place / "merged").folder


@pytest.fixture
def finished(merge: Path, tmp_path: Path) -> Path:
    """A merge of two local models, in three shards."""
    return Path(shutil.copytree(merge, tmp_path / "merged"))


def push(folder: Path, **options: Any) -> Pushed:
    return publishing.push(folder, to(**options))


# ---- what goes there


def test_a_merge_arrives_whole_in_one_commit(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    pushed = push(finished, private=True, message="Average of a and b")
    assert remote(hub) == contents(finished)
    assert commits(hub) == 1 and hub.repos[REPO].log[-1][2] == "Average of a and b"
    assert hub.repos[REPO].private
    assert pushed.commit == hub.repos[REPO].refs["main"] and set(pushed.sent) == set(contents(finished))
    assert pushed.url == f"{hub.url}/{REPO}/tree/{pushed.commit}"
    back = snapshot_download(REPO, revision=pushed.commit, local_dir=tmp_path / "back")
    assert contents(finished).items() <= contents(Path(back)).items()
    # The token is for the Hub, not for the storage that uploads go to.
    assert all(r.token != r.path.startswith("/upload/") for r in hub.requests if r.method in ("POST", "PUT"))


def test_a_second_push_of_the_same_commits_nothing(hub: HubServer, finished: Path) -> None:
    first, received = push(finished), hub.received("/upload/")
    again = push(finished)
    assert (again.changed, again.commit) == (False, first.commit)
    assert commits(hub) == 1 and hub.received("/upload/") == received
    assert hub.count("/commit/") == 1


def test_what_changed_goes_alone_and_what_is_stale_leaves(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    push(finished)
    files = hub.repos[REPO].head()
    for name in ("pytorch_model.bin", "old.safetensors", "adapter_config.json", "notes.txt", "probe/report.html",
                 "onnx/model.safetensors"):  # fmt: skip
        files[name] = File(name, b"old")
    other = Merge(write_recipe(tmp_path, 5.0), num_workers=1).write(tmp_path / "one").folder
    pushed = push(other)
    kept = {"notes.txt": b"old", "onnx/model.safetensors": b"old"}
    assert remote(hub) == contents(other) | kept and commits(hub) == 2
    assert set(pushed.removed) == {
        "pytorch_model.bin", "old.safetensors", "adapter_config.json", "probe/report.html",
        "model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }  # fmt: skip
    (other / "README.md").write_text((other / "README.md").read_text() + "More.\n")
    assert push(other).sent == ("README.md",)


def test_a_branch_is_made_and_main_stays(hub: HubServer, finished: Path) -> None:
    pushed = push(finished, revision="v2")
    assert remote(hub, "v2") == contents(finished) and remote(hub) == {}
    assert pushed.commit == hub.repos[REPO].refs["v2"]


def test_a_pull_request_is_opened_once(hub: HubServer, finished: Path) -> None:
    hub.repos["readers/theirs"] = Repo()
    hub.repos["readers/theirs"].commit("main", {"config.json": File("config.json", b"{}")})
    options = {"repo_id": "readers/theirs", "create_pr": True}
    first = push(finished, **options)
    assert first.pull_request == first.url == f"{hub.url}/readers/theirs/discussions/1"
    assert remote(hub, "refs/pr/1", "readers/theirs") == contents(finished)
    assert list(remote(hub, repo_id="readers/theirs")) == ["config.json"]
    again = push(finished, **options)
    assert (again.pull_request, again.changed) == (first.pull_request, False)
    assert hub.repos["readers/theirs"].pull_requests == [(1, Destination.message)]


def test_a_name_without_an_owner_is_the_users(hub: HubServer, finished: Path) -> None:
    assert push(finished, repo_id="mine").repo_id == "me/mine"
    assert remote(hub, repo_id="me/mine") == contents(finished)


def test_an_adapter_folder(hub: HubServer, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "lora", {"base_model.model.w.lora_A.weight": torch.ones(2, 4)})
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    push(folder)
    assert remote(hub) == contents(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"adapter_model.safetensors is missing: the folder is not whole"):
        push(folder)


def test_hidden_files_stay_here(hub: HubServer, finished: Path) -> None:
    before = contents(finished)
    for name in (".git/config", ".DS_Store", "__pycache__/x.pyc"):
        (finished / name).parent.mkdir(exist_ok=True)
        (finished / name).write_text("x")
    push(finished)
    assert remote(hub) == before


def test_a_repositorys_gitignore_leaves_nothing_out(hub: HubServer, finished: Path) -> None:
    push(finished)
    asked = [r for r in hub.requests if "/preupload/" in r.path]
    assert asked and all(body.get("gitIgnore") == "" for body in hub.bodies("/preupload/"))


# ---- what does not go


def cut_short(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def changed(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def link_out(folder: Path) -> None:
    (folder / "secret.txt").symlink_to("/etc/hostname")


def link_to_a_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent)


def other_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("00002-of", "00003-of"))


def local_path_in_the_card(folder: Path) -> None:
    (folder / "README.md").write_text(f"made in {folder.parent}, of a")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "00003.safetensors is missing: .*not whole"),
        (cut_short, r"has 16,\d+ bytes where merge_manifest.json says 16,\d+: merge again"),
        (changed, "is not as it was written .merge_manifest.json has its sha256.: merge again"),
        (other_index, "does not name the weight files that merge_manifest.json lists"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "index.json is missing"),
        (lambda f: (f / "merge_manifest.json").unlink(), "is no merge of ctl-merge.*hf upload"),
        (lambda f: (f / "merge_manifest.json").write_text("[]"), "is no JSON object"),
        (lambda f: (f / "merge_manifest.json").write_text("{}"), "lists no weight files"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "journal").write_text(""), "is an unfinished merge: finish it with --resume"),
        (lambda f: (f / "extra.safetensors").write_text(""), "extra.safetensors is not of this merge"),
        (link_out, "secret.txt is a link that leads out of the folder"),
        (link_to_a_folder, "more is a link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is no ordinary file"),
        (local_path_in_the_card, "README.md names the local path /.*, which would become public"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_before_anything_is_asked(
    hub: HubServer, finished: Path, spoil: Callable[[Path], object], text: str
) -> None:
    spoil(finished)
    with pytest.raises(OutputError, match=text):
        push(finished)
    assert not hub.requests


def test_a_partial_folder_is_refused(hub: HubServer, finished: Path) -> None:
    for folder in (finished.rename(finished.with_name("merged.partial")), finished / "none"):
        with pytest.raises(OutputError, match=r"unfinished merge|no such folder"):
            push(folder)


# ---- rights


def test_without_a_token(server: HubServer, finished: Path) -> None:
    with pytest.raises(
        HubError, match="a push needs a token that may write: log in with `hf auth login` or set HF_TOK"
    ):
        push(finished)


@pytest.mark.parametrize(
    ("user", "options", "text"),
    [
        ({"token_role": "read"}, {}, "the token may only read. Make one with the role write"),
        ({"orgs": {"org": "read"}}, {}, "the token may not write there. .*--create-pr"),
        ({"orgs": {}}, {"repo_id": "org/there"}, "the token may not write there. .*--create-pr"),
        ({}, {"repo_id": "org/there", "private": True}, "exists and is public: leave out --private"),
        ({}, {"repo_id": "org/secret", "private": False}, "exists and is private: leave out --no-private"),
        ({}, {"revision": "a" * 40}, "this is a commit, and a push goes to a branch"),
        ({}, {"repo_id": "org/a b"}, "cannot be a repository"),
        ({}, {"revision": "a..b"}, "cannot be a branch"),
    ],
)
def test_rights_are_asked_before_anything_is_sent(
    hub: HubServer, finished: Path, user: dict[str, Any], options: dict[str, Any], text: str
) -> None:
    for name, value in user.items():
        setattr(hub.user, name, value)
    for name, private in (("org/there", False), ("org/secret", True)):
        hub.repos[name] = Repo(private=private)
        hub.repos[name].commit("main", {"config.json": File("config.json", b"{}")})
    with pytest.raises(HubError, match=text):
        push(finished, **options)
    assert hub.count("/commit/") == hub.count("/upload/") == 0


def test_a_bad_token(hub: HubServer, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretOther")
    with pytest.raises(HubError, match="the Hub does not accept the token") as caught:
        push(finished)
    assert "secret" not in str(caught.value)


# ---- faults: each ends in success, or in an error with nothing half-pushed

STEPS = {
    "whoami": ("GET", "/api/whoami-v2"), "create": ("POST", "/api/repos/create"),
    "info": ("GET", f"/api/models/{REPO}"), "card": ("POST", "/api/validate-yaml"),
    "preupload": ("POST", "/preupload/"), "batch": ("POST", "/lfs/objects/batch"),
    "upload": ("PUT", "/upload/"), "verify": ("POST", "/lfs/verify"), "commit": ("POST", "/commit/"),
}  # fmt: skip


@pytest.mark.parametrize("kind", [{"status": 503}, {"status": 429}, {"lost": True}])
@pytest.mark.parametrize("step", STEPS)
def test_a_passing_failure_is_waited_out(hub: HubServer, finished: Path, step: str, kind: dict[str, Any]) -> None:
    method, part = STEPS[step]
    hub.fault(part, method=method, times=1, **kind)
    push(finished)
    assert remote(hub) == contents(finished) and commits(hub) == 1


LASTING = {
    401: "does not accept the token", 403: "may not write", 404: "not found|no such", 409: "another change is going on",
    413: "refuses the request .HTTP 413", 429: "too many requests", 500: "the Hub itself fails",
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "status"),
    [
        *((step, status) for step in STEPS for status in (403, 500)),
        *((step, status) for step in ("batch", "upload", "commit") for status in (401, 404, 409, 413, 429)),
    ],
)
def test_a_lasting_failure_leaves_all_or_nothing(hub: HubServer, finished: Path, step: str, status: int) -> None:
    before = contents(finished)
    method, part = STEPS[step]
    hub.fault(part, method=method, status=status)
    if (step, status) == ("create", 403):  # the repository may be there although the token may make none
        hub.repos[REPO] = Repo()
        hub.repos[REPO].commit("main", {})
        push(finished)
    else:
        with pytest.raises(HubError, match=LASTING[status]) as caught:
            push(finished)
        assert "hf_" not in str(caught.value) and "X-Signature" not in str(caught.value)
        assert REPO not in hub.repos or (commits(hub) == 0 and remote(hub) == {})
    hub.faults.clear()
    assert contents(finished) == before
    push(finished)
    assert remote(hub) == before and commits(hub) == 1


def test_an_upload_that_breaks_goes_on(hub: HubServer, finished: Path) -> None:
    hub.fault("/upload/", method="PUT", cut=1000, times=1)  # the client tries again
    push(finished)
    assert remote(hub) == contents(finished)


def test_objects_that_arrived_are_not_sent_again(hub: HubServer, finished: Path) -> None:
    hub.fault("/commit/", method="POST", status=403)
    with pytest.raises(HubError):
        push(finished)
    received = hub.received("/upload/")
    assert received > 0 and commits(hub) == 0
    hub.faults.clear()
    push(finished)
    assert hub.received("/upload/") == received and remote(hub) == contents(finished)


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub: HubServer, finished: Path, create_pr: bool) -> None:
    hub.fault("/commit/", method="POST", lost=True)  # whatever is sent there, no answer comes
    pushed = push(finished, create_pr=create_pr)
    assert pushed.changed and set(pushed.sent) == set(contents(finished))
    ref = "refs/pr/1" if create_pr else "main"
    assert commits(hub, ref) == 1 and remote(hub, ref) == contents(finished)
    assert len(hub.repos[REPO].pull_requests) == create_pr


def test_the_hub_goes_away_after_the_commit(hub: HubServer, finished: Path) -> None:
    hub.fault("/commit/", method="POST", lost=True)
    hub.fault(f"/api/models/{REPO}/revision", status=503, after=1)
    with pytest.raises(HubError, match=r"itself fails.*Whether the commit arrived is not known: the next push looks"):
        push(finished)
    hub.faults.clear()
    assert not push(finished).changed and commits(hub) == 1


def moved(hub: HubServer, path: str) -> Callable[[], None]:
    def move() -> None:
        repo = hub.repos[REPO]
        repo.commit("main", repo.head() | {path: File(path, b"theirs")}, repo.refs["main"], "theirs")

    return move


def test_a_branch_that_moves_elsewhere_is_followed(hub: HubServer, finished: Path) -> None:
    hub.before("/commit/", moved(hub, "notes.txt"))
    push(finished)
    assert remote(hub) == contents(finished) | {"notes.txt": b"theirs"} and commits(hub) == 2


def test_a_branch_that_moves_in_the_same_files_is_left(hub: HubServer, finished: Path) -> None:
    hub.before("/commit/", moved(hub, "README.md"))
    with pytest.raises(HubError, match=f"{REPO} moved during the push .*in files that the push changes: look at it"):
        push(finished)
    assert remote(hub) == {"README.md": b"theirs"}


@pytest.mark.parametrize(
    ("step", "page"), [*((step, b"<html>Log in</html>") for step in STEPS), ("commit", b"[]"), ("commit", b"{}")]
)
def test_something_else_than_a_hub_answers(hub: HubServer, finished: Path, step: str, page: bytes) -> None:
    method, part = STEPS[step]
    hub.fault(part, method=method, body=page)
    try:
        push(finished)
    except HubError as error:
        assert "hf_" not in str(error)
        assert REPO not in hub.repos or remote(hub) == {}
    else:  # as for the answer to an upload, which says nothing
        assert remote(hub) == contents(finished)


# ---- the command


def run(hub: HubServer, tmp_path: Path, *words: str | Path, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = hub_environment(hub, tmp_path) | {"HF_TOKEN": token, "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "ctl_merge", *map(str, words)], env=environment, cwd=ROOT, text=True, capture_output=True
    )


def test_the_command(hub: HubServer, finished: Path, tmp_path: Path) -> None:
    shown = run(hub, tmp_path, "push", finished, REPO, "--dry-run")
    assert shown.returncode == 0 and "merge_manifest.json" in shown.stdout and "sent" in shown.stdout, shown.stderr
    assert REPO not in hub.repos
    done = run(hub, tmp_path, "push", finished, REPO, "--private", "--json")
    data = json.loads(done.stdout)
    assert (done.returncode, data["commit"], data["changed"]) == (0, hub.repos[REPO].refs["main"], True)
    assert remote(hub) == contents(finished)
    again = run(hub, tmp_path, "push", finished, REPO)
    assert again.stdout.startswith("nothing to push: all of it is there\n→ http")
    refused = run(hub, tmp_path, "push", finished, REPO, token="hf_wrongToken")
    assert refused.returncode == 2 and "hf_wrong" not in refused.stdout + refused.stderr
    assert refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
