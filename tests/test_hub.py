"""The Hub as a user meets it: pinned, partial, cached, offline, refused and broken. No test leaves the machine."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer, hub_environment
from huggingface_hub.errors import LocalEntryNotFoundError

from ctl_merge import hub
from ctl_merge.errors import HubError

WEIGHTS = "model.safetensors"
ROOT = Path(hub.__file__).parent.parent


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config and one tensor of 100 kB."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub" / "notes.txt").write_text("notes")
    header = json.dumps({"w": {"dtype": "F32", "shape": [25000], "data_offsets": [0, 100000]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(250)) * 400)
    return folder


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_importing_the_module_imports_neither_torch_nor_the_client() -> None:
    code = "import sys, ctl_merge.hub; print({'torch', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).strip() == "set()"


def test_resolve_pins_the_commit_and_lists_the_files_in_one_request(server: HubServer, model: Path) -> None:
    commit = server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    assert (str(snapshot), snapshot.commit, snapshot.folder) == ("org/name@main", commit, None)
    assert [f.path for f in snapshot.files] == ["config.json", WEIGHTS, "sub/notes.txt"]
    data = (model / WEIGHTS).read_bytes()
    assert snapshot.file(WEIGHTS) == hub.HubFile(WEIGHTS, len(data), hashlib.sha256(data).hexdigest())
    assert snapshot.file("config.json").sha256 is None
    assert server.count("org/name") == 1


def test_what_was_pinned_stays_when_the_branch_moves(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    before = hub.resolve("org/name")
    (model / "config.json").write_text("{}")
    server.add("org/name", model)
    server.add("org/name", model, revision="refs/pr/1")
    assert hub.read_range(before, "config.json", 0, 5) == b'{"mod'
    assert (hub.download(before, ["config.json"]) / "config.json").read_text() == '{"model_type": "llama"}'
    after = hub.resolve("org/name", "refs/pr/1")
    assert after.commit != before.commit == hub.resolve("org/name", before.commit).commit
    assert (hub.download(after, ["config.json"]) / "config.json").read_text() == "{}"


@pytest.mark.parametrize("storage", [False, True])
def test_a_header_is_read_without_the_weights(
    server: HubServer, model: Path, storage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.add("org/name", model, storage=storage, private=True)
    snapshot = hub.resolve("org/name")
    length = struct.unpack("<Q", hub.read_range(snapshot, WEIGHTS, 0, 8))[0]
    assert "w" in json.loads(hub.read_range(snapshot, WEIGHTS, 8, 8 + length))
    assert server.sent(WEIGHTS) == 8 + length
    # The token is for the Hub, not for the storage that it sends its readers to.
    assert all(r.token != ("/storage/" in r.path) for r in server.requests)
    assert server.count("/storage/") == (2 if storage else 0)


def test_a_range_is_what_was_asked_for_or_an_error(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    snapshot, data = hub.resolve("org/name"), (model / WEIGHTS).read_bytes()
    assert hub.read_range(snapshot, WEIGHTS, 7, 7) == b""
    assert hub.read_range(snapshot, WEIGHTS, 90000, len(data)) == data[90000:]
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: bytes 0 to {len(data) + 1} .* has {len(data)}"):
        hub.read_range(snapshot, WEIGHTS, 0, len(data) + 1)
    server.fault(WEIGHTS, whole=True)
    assert hub.read_range(snapshot, WEIGHTS, 1000, 2000) == data[1000:2000]


def test_download_fetches_only_what_is_wanted_and_only_once(server: HubServer, model: Path) -> None:
    (model / "odd[1]*.json").write_text("odd")
    (model / "odd1.json").write_text("not wanted")
    server.add("org/name", model)
    snapshot, wanted = hub.resolve("org/name"), ["config.json", "sub/notes.txt", "odd[1]*.json"]
    assert hub.cached(snapshot, wanted) == set()
    folder = hub.download(snapshot, wanted)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(wanted)
    assert (folder / "odd[1]*.json").read_text() == "odd"
    assert (server.sent(WEIGHTS), server.sent("odd1.json")) == (0, 0)
    assert hub.cached(snapshot, [*wanted, WEIGHTS]) == set(wanted)
    requests = server.count()
    assert hub.download(snapshot, wanted) == folder
    assert hub.read_range(snapshot, "config.json", 2, 7) == b"model"
    assert server.count() == requests


@pytest.mark.parametrize("reason", ["offline mode", "no connection", "timeout", "down"])
def test_the_cache_stands_in_for_a_hub_out_of_reach(
    server: HubServer, model: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = server.add("org/name", model)
    online = hub.resolve("org/name")
    folder = hub.download(online, [WEIGHTS, "sub/notes.txt"])
    if reason == "offline mode":
        offline(monkeypatch)
    elif reason == "no connection":
        server.stop()
    elif reason == "timeout":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
        server.fault("/api/", delay=10.0)
    else:
        server.fault("/api/", status=503)
    snapshot = hub.resolve("org/name", "main")
    assert (snapshot.commit, snapshot.folder) == (commit, folder)
    assert snapshot.files == (online.file(WEIGHTS), online.file("sub/notes.txt"))
    assert hub.resolve("org/name", commit).folder == folder
    assert hub.download(snapshot, [WEIGHTS]) == folder
    assert hub.read_range(snapshot, WEIGHTS, 8, 11) == b'{"w'
    assert hub.cached(snapshot, [WEIGHTS]) == {WEIGHTS}
    for wanted in (lambda: hub.download(snapshot, ["config.json"]), lambda: hub.cached(snapshot, ["config.json"])):
        with pytest.raises(HubError, match="org/name@main, config.json: not in the local cache, and the Hub is out of"):
            wanted()
    with pytest.raises(HubError, match="org/name@v2: .*Run again|org/name@v2: .*run again"):
        hub.resolve("org/name", "v2")


def test_out_of_reach_and_not_in_the_cache(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    with monkeypatch.context() as patch:
        offline(patch)
        for call in (lambda: hub.resolve("org/name"), lambda: hub.download(snapshot, [WEIGHTS])):
            with pytest.raises(HubError, match=r"org/name@main.*not in the local cache, and offline.*HF_HUB_OFFLINE"):
                call()
    server.stop()
    with pytest.raises(HubError, match=r"org/name@main: no connection to the Hub.*\(ConnectError\).*no copy"):
        hub.resolve("org/name")
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: no connection"):
        hub.read_range(snapshot, WEIGHTS, 0, 8)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS} and 1 more: no connection"):
        hub.download(snapshot, [WEIGHTS, "sub/notes.txt"])


def test_a_slow_hub_is_an_error_in_the_end(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    server.fault("/", delay=10.0)
    for call in (lambda: hub.resolve("org/name"), lambda: hub.read_range(snapshot, WEIGHTS, 0, 8)):
        with pytest.raises(HubError, match=r"ReadTimeout"):
            call()


@pytest.mark.parametrize("token", [None, "hf_other", TOKEN])
def test_gated(server: HubServer, model: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.add("org/name", model, gated=True, storage=True)
    snapshot = hub.resolve("org/name")  # as on the Hub, everyone may see what a gated repository holds
    for call in (lambda: hub.read_range(snapshot, WEIGHTS, 0, 8), lambda: hub.download(snapshot, [WEIGHTS])):
        if token == TOKEN:
            call()
            continue
        with pytest.raises(HubError) as caught:
            call()
        assert str(caught.value) == (
            f"org/name@main, {WEIGHTS}: the repository is gated. Request access at https://huggingface.co/org/name, "
            "then log in with `hf auth login` or set HF_TOKEN."
        )


@pytest.mark.parametrize("token", [None, "hf_other"])
def test_missing_or_private(server: HubServer, model: Path, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.add("org/private", model, private=True)
    for repo_id in ("org/private", "org/none", "none"):
        with pytest.raises(HubError, match=rf"{repo_id}@main: no such repository, or a private one.*`hf auth login`"):
            hub.resolve(repo_id)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.resolve("org/private").files


def test_no_such_revision_or_file(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    with pytest.raises(HubError, match=r"org/name@v2: no such branch, tag or commit.*https://huggingface.co/org/name"):
        hub.resolve("org/name", "v2")
    snapshot = hub.resolve("org/name")
    for call in (hub.download, hub.cached, lambda s, paths: hub.read_range(s, *paths, 0, 1)):
        with pytest.raises(HubError, match=rf"org/name@main, a.bin: .*no such file.*tree/{snapshot.commit}"):
            call(snapshot, ["a.bin"])
    # A file that the listing has, but not the storage.
    snapshot = replace(snapshot, files=(*snapshot.files, hub.HubFile("a.bin", 10, None)))
    with pytest.raises(HubError, match="org/name@main, a.bin: the repository has no such file"):
        hub.read_range(snapshot, "a.bin", 0, 1)
    with pytest.raises(HubError, match="org/name@main, a.bin: the Hub lists this file but did not send it"):
        hub.download(snapshot, ["a.bin"])


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "does not accept the token"),
        (403, "refuses access"),
        (404, "not found"),
        (418, "refuses the request .HTTP 418."),
        (429, "too many requests"),
        (500, "itself fails .HTTP 500."),
        (504, "itself fails .HTTP 504."),
    ],
)
def test_answers_that_are_errors(server: HubServer, model: Path, status: int, text: str) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    server.fault("/", status=status)
    with pytest.raises(HubError, match=f"org/name@main: .*{text}"):
        hub.resolve("org/name")
    server.fault("/", method="HEAD", status=status)
    for call in (lambda: hub.read_range(snapshot, WEIGHTS, 0, 8), lambda: hub.download(snapshot, [WEIGHTS])):
        with pytest.raises(HubError, match=f"org/name@main, {WEIGHTS}: .*{text}"):
            call()


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429}, {"cut": 3}])
def test_a_passing_failure_is_waited_out(server: HubServer, model: Path, fault: dict[str, int]) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    server.fault(WEIGHTS, times=2, **fault)
    assert hub.read_range(snapshot, WEIGHTS, 8, 18) == (model / WEIGHTS).read_bytes()[8:18]


def test_a_transfer_cut_in_the_middle(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    server.fault(WEIGHTS, cut=0)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: .*it broke \(RemoteProtocolError\)"):
        hub.read_range(snapshot, WEIGHTS, 0, 8)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: .*it broke"):
        hub.download(snapshot, ["config.json", WEIGHTS])
    assert hub.cached(snapshot, ["config.json", WEIGHTS]) == {"config.json"}
    server.faults.clear()
    server.fault(WEIGHTS, cut=60000, times=1)  # the client takes the transfer up where it broke
    assert (hub.download(snapshot, [WEIGHTS]) / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_short_answer_is_never_taken_for_the_whole(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    server.fault(WEIGHTS, short=5)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: 5 bytes came instead of 8. Run again"):
        hub.read_range(snapshot, WEIGHTS, 0, 8)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: the transfer failed or was not whole"):
        hub.download(snapshot, [WEIGHTS])
    assert hub.cached(snapshot, [WEIGHTS]) == set()


def test_a_failure_of_the_xet_transfer(server: HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")

    def fail(*_: object, local_files_only: bool = False, **__: object) -> str:
        raise LocalEntryNotFoundError("") if local_files_only else RuntimeError("CAS error: https://cas?signature=1")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: the transfer failed .*\(RuntimeError\)") as caught:
        hub.download(snapshot, [WEIGHTS])
    assert "signature" not in str(caught.value)


def test_a_damaged_file_in_the_cache(server: HubServer, model: Path) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    (hub.download(snapshot, [WEIGHTS]) / WEIGHTS).resolve().write_bytes(b"half")
    assert hub.cached(snapshot, [WEIGHTS]) == set()
    assert hub.read_range(snapshot, WEIGHTS, 8, 11) == b'{"w'
    with pytest.raises(HubError, match=rf"org/name@main, {WEIGHTS}: 4 bytes in the local cache, .* Delete .*run again"):
        hub.download(snapshot, [WEIGHTS])


def test_a_cache_that_cannot_be_written(server: HubServer, model: Path, tmp_path: Path) -> None:
    server.add("org/name", model)
    snapshot = hub.resolve("org/name")
    (tmp_path / "huggingface").write_text("a file where the folder should be")
    with pytest.raises(HubError, match="org/name@main, config.json: the local cache cannot be used: .*HF_HOME"):
        hub.download(snapshot, ["config.json"])


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "org/..", "../name", "org/a b", "org/a\n", "org/\x1b[31m", "a--b"])
def test_invalid_repository(server: HubServer, repo_id: str) -> None:
    with pytest.raises(HubError) as caught:
        hub.resolve(repo_id)
    assert repr(repo_id) in str(caught.value) and str(caught.value).isprintable()
    assert not server.requests


@pytest.mark.parametrize("revision", ["..", "a/../b", "/main", "main/", "a b", "a\x1b", "x~1", "a//b"])
def test_invalid_revision(server: HubServer, revision: str) -> None:
    with pytest.raises(HubError, match="org/name: .* cannot be a branch") as caught:
        hub.resolve("org/name", revision)
    assert str(caught.value).isprintable() and not server.requests


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "a\x1b[31m"])
def test_file_names_that_leave_the_repository(server: HubServer, model: Path, path: str) -> None:
    commit = server.add("org/name", model)
    files = server.repos["org/name"].commits[commit]
    files[path] = files["config.json"]
    with pytest.raises(HubError, match="not a path inside the repository"):
        hub.resolve("org/name")


@pytest.mark.parametrize("page", [b"<html>Log in to the network</html>", b"[]", b"{}", b'{"id": "org/name"}'])
def test_something_else_than_a_hub_answers(server: HubServer, page: bytes) -> None:
    server.fault("/", body=page)
    with pytest.raises(HubError, match="org/name@main: what answers is not a Hub. Check HF_ENDPOINT"):
        hub.resolve("org/name")


@pytest.mark.parametrize("token", ["hf_sécret", "hf_secret\x0bx"])
def test_a_token_is_never_shown(
    server: HubServer, model: Path, token: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    server.add("org/name", model)
    with pytest.raises(HubError, match="the token holds characters") as caught:
        hub.resolve("org/name")
    assert "hf_s" not in str(caught.value) + caplog.text


def test_in_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    code = (
        "from ctl_merge import hub\n"
        "snapshot = hub.resolve('org/name')\n"
        "print(hub.read_range(snapshot, 'model.safetensors', 8, 11))\n"
        "print(hub.download(snapshot, ['config.json']))\n"
    )
    with HubServer() as server:
        commit = server.add("org/name", model)
        environment = hub_environment(server, tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, text=True, capture_output=True, check=True
        )
        assert server.sent(WEIGHTS) == 3
    cache = os.path.realpath(environment["HF_HUB_CACHE"])
    assert done.stdout.split("\n")[:2] == ["b'{\"w'", f"{cache}/models--org--name/snapshots/{commit}"]
