"""The loopback Hub's writing side: repositories, branches, large objects, commits, pull requests."""

import base64
import hashlib
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import yaml
from hub_store import TOKEN, File, Repo

if TYPE_CHECKING:
    from hub_server import Handler as Base
else:
    Base = object


class Writing(Base):
    """Answers to POST and PUT, and to the questions that a client asks before."""

    def whoami(self) -> None:
        user = self.hub.user
        if self.known():
            orgs = [{"name": name, "roleInOrg": role} for name, role in user.orgs.items()]
            access = {"accessToken": {"role": user.token_role, "displayName": "loopback"}}
            self.answer_json({"type": "user", "name": user.name, "orgs": orgs, "auth": access})

    def known(self) -> bool:
        """Whether the token is a user's; answers if not."""
        if self.token != f"Bearer {TOKEN}":
            self.refuse(401, "")
            return False
        return True

    def asked(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.path).query).get(name, [None])[0]

    def open_to_write(self, repo: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit of a branch that the user may write to, or open a pull request against."""
        opened = self.open_commit(repo, revision) if self.known() else None
        if opened is None:
            return None
        if revision not in opened[0].refs:
            self.refuse(400, "")  # a commit cannot be written to
            return None
        if not self.asked("create_pr") and not self.hub.user.may_write(repo.partition("/")[0]):
            self.refuse(403, "")
            return None
        return opened[0], opened[1]

    def create(self) -> None:
        asked = json.loads(self.body)
        name, owner = asked["name"], asked.get("organization") or self.hub.user.name
        if not self.known():
            return
        repo_id = f"{owner}/{name}"
        where = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.answer_json(where | {"error": "You already created this model repo"}, 409)
        if not self.hub.user.may_write(owner):
            return self.refuse(403, "")
        private = asked.get("private") or asked.get("visibility") == "private"
        repo = self.hub.repos[repo_id] = Repo(private=bool(private))
        repo.commit(
            "main", {".gitattributes": File(".gitattributes", b"*.safetensors filter=lfs\n")}, message="initial"
        )
        self.answer_json(where)

    def branch(self, repo: str, branch: str) -> None:
        if (opened := self.open_to_write(repo, "main")) is None:
            return
        found, commit = opened
        if branch in found.refs:
            return self.answer_json({"error": "Reference already exists"}, 409)
        found.refs[branch] = commit
        self.answer_json({})

    def validate_yaml(self) -> None:
        _, _, front = json.loads(self.body)["content"].partition("---\n")
        try:
            yaml.safe_load(front.partition("\n---\n")[0])
        except yaml.YAMLError as error:
            return self.answer_json({"errors": [{"message": str(error)}]}, 400)
        self.answer_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if (opened := self.open_to_write(repo, revision)) is None:
            return
        found, commit = opened
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            there = found.commits[commit].get(path)
            large = File(path, b"").large or asked["size"] > 10_000_000 or b"\0" in base64.b64decode(asked["sample"])
            oid = (there.sha256 if there.large else there.oid) if there else None
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        self.answer_json({"files": files})

    def batch(self, repo: str) -> None:
        asked = json.loads(self.body)
        if not self.known() or (found := self.open_repo(repo)) is None:
            return
        if "ref" in asked and not self.hub.user.may_write(repo.partition("/")[0]):
            return self.refuse(403, "")
        objects = []
        for item in asked["objects"]:
            oid = item["oid"]
            upload = {"href": f"{self.hub.storage_url}/upload/{repo}/{oid}?X-Signature={oid[:16]}", "header": {}}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/verify"}
            actions = {} if oid in found.objects else {"actions": {"upload": upload, "verify": verify}}
            objects.append(item | actions)
        self.answer_json({"transfer": "basic", "objects": objects})

    def put(self, repo: str, oid: str) -> None:
        if self.token or hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "")
        self.hub.repos[repo].objects[oid] = self.body
        self.answer(200, b"", {})

    def verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        stored = self.hub.repos[repo].objects.get(asked["oid"], b"")
        self.refuse(404, "") if len(stored) != asked["size"] else self.answer_json({})

    def commit(self, repo: str, revision: str) -> None:
        """All lines of the request, or none of them."""
        if (opened := self.open_to_write(repo, revision)) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            found, head = opened[0], opened[0].refs[revision]
            parent, request = header.get("parentCommit", head), bool(self.asked("create_pr"))
            if parent != head and not request:
                return self.refuse(412, "")
            files = dict(found.commits[parent])
            for line in lines[1:]:
                if not self.apply(line["key"], line["value"], found, files):
                    return self.refuse(400, "")
            ref = f"refs/pr/{len(found.pull_requests) + 1}" if request else revision
            done = found.commit(ref, files, parent, header["summary"])
        pull = f"{self.hub.url}/{repo}/discussions/{ref.rpartition('/')[2]}" if request else None
        self.answer_json(
            {"commitUrl": f"{self.hub.url}/{repo}/commit/{done}", "commitOid": done, "pullRequestUrl": pull}
        )

    def apply(self, key: str, value: dict[str, Any], repo: Repo, files: dict[str, File]) -> bool:
        path = value["path"]
        if key == "file":
            files[path] = File(path, base64.b64decode(value["content"]))
            files[path].large = False
        elif key == "lfsFile" and value["oid"] in repo.objects:
            files[path] = File(path, repo.objects[value["oid"]])
            files[path].large = True
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            return False
        return True

    def discussions(self, repo: str) -> None:
        if (found := self.open_repo(repo)) is None:
            return
        common = {"author": {"name": self.hub.user.name}, "createdAt": "2026-01-01T00:00:00.000Z", "status": "open"}
        common |= {"repo": {"name": repo, "type": "model"}, "isPullRequest": True}
        listed = [common | {"num": number, "title": title} for number, title in found.pull_requests]
        self.answer_json({"discussions": listed, "count": len(listed), "start": 0})


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Writing.whoami),
    ("POST", r"/api/repos/create", Writing.create),
    ("POST", r"/api/validate-yaml", Writing.validate_yaml),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Writing.branch),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Writing.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Writing.commit),
    ("GET", rf"/api/models/{REPO}/discussions", Writing.discussions),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Writing.batch),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", Writing.verify),
    ("PUT", rf"/upload/{REPO}/(?P<oid>[0-9a-f]{{64}})", Writing.put),
]
