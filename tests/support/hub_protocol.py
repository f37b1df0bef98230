"""The requests that huggingface_hub's client makes, answered from the memory of `hub_server.Hub`.

One class, three layers: HTTP with its faults, who may do what, and one method for each endpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from hub_server import Hub, Repo, User

CHUNK = 2**14


class Stop(Exception):
    """End of a request: an answer with an error, or none."""

    def __init__(self, status: int, code: str = "", message: str = "", **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message, **headers}


class Handler(BaseHTTPRequestHandler):
    """One connection. `answer` sends; a `Stop` raised anywhere becomes an error."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    MODEL = r"/api/models/(?P<id>[^/]+/[^/?]+)"
    ROUTES = [
        (r"GET /api/whoami-v2", "whoami"),
        (r"POST /api/repos/create", "create"),
        (r"POST /api/validate-yaml", "validate"),
        (rf"GET {MODEL}/auth-check", "auth_check"),
        (rf"GET {MODEL}/tree/(?P<rev>[^/]+)", "tree"),
        (rf"GET {MODEL}/discussions", "discussions"),
        (rf"GET {MODEL}/xet-(read|write)-token/(?P<rev>[^/]+)", "xet_token"),
        (rf"POST {MODEL}/preupload/(?P<rev>[^/]+)", "preupload"),
        (rf"POST {MODEL}/commit/(?P<rev>[^/]+)", "commit"),
        (rf"GET {MODEL}(/revision/(?P<rev>[^/]+))?", "model"),
        (r"GET /api/models", "search"),
        (r"POST /(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        (r"PUT /lfs/(?P<oid>\w+)", "put"),
        (r"POST /lfs-verify", "verify"),
        (r"(GET|HEAD) /(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.fault = self.hub.fault_of(f"{self.command} {self.path}")
        try:
            self.read_body()
            if self.fault.cut == "before":
                raise Stop(0)
            if self.fault.status:
                raise Stop(self.fault.status, self.fault.code, self.fault.message, **self.fault.headers)
            with self.hub.lock:
                self.dispatch(url.path)
        except Stop as stop:
            if stop.status == 0:
                self.hang_up()
            else:
                self.answer({"error": str(stop)} if str(stop) else {}, stop.status, **stop.headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def dispatch(self, path: str) -> None:
        if self.hub.login.serve(self, path):
            return
        for pattern, name in self.ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                groups = {key: unquote(value) for key, value in match.groupdict().items() if value}
                getattr(self, name)(**groups)
                return
        raise Stop(404, message=f"no such route: {self.command} {path}")

    def read_body(self) -> None:
        left, parts = int(self.headers.get("Content-Length", 0)), []
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                time.sleep(self.fault.slow)
            self.rfile.readline()
        half = left // 2 if self.fault.cut == "receiving" else -1
        while left > 0:
            if left <= half:
                raise Stop(0)
            parts.append(self.rfile.read(min(left, CHUNK)))
            left -= len(parts[-1])
            if not parts[-1]:
                raise Stop(0)
            time.sleep(self.fault.slow)
        self.body = b"".join(parts)

    def hang_up(self) -> None:
        self.fault.then()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        if self.fault.cut == "after":
            return self.hang_up()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            if value:
                self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault.cut == "half" else data)
            if self.fault.cut == "half":
                self.wfile.flush()
                self.hang_up()

    def log_message(self, *_: object) -> None:
        pass

    # --- who may do what ---

    def user(self) -> User | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        user = self.hub.users.get(token)
        if user is None or user.expires_at < time.time():
            raise Stop(401, message="Invalid credentials in Authorization header")
        return user

    def readable(self, repo_id: str, content: bool = True) -> Repo:
        """The repository, if the user may see it (and its content, if it is gated)."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        mine = user is not None and repo_id.split("/")[0] in {user.name, *user.orgs}
        if repo is None or (repo.private and not mine):
            raise Stop(404 if user else 401, "RepoNotFound", "Repository not found")
        granted = user is not None and user.name in repo.readers and "gated-repos" in user.scopes
        if content and repo.gated and not mine and not granted:
            raise Stop(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted")
        return repo

    def writable(self, repo_id: str) -> Repo:
        user, repo = self.user(), self.readable(repo_id)
        if user is None or ("create_pr" not in self.query and repo_id.split("/")[0] not in {user.name, *user.orgs}):
            raise Stop(403, message="You don't have the rights to write to this repository")
        own = "contribute-repos" in user.scopes and "contribute-repos" in repo.created_with
        if "write-repos" not in user.scopes and not own:
            raise Stop(403, message="Your token does not have the required scope: write-repos")
        return repo

    def snapshot(self, repo: Repo, rev: str) -> tuple[str, dict[str, bytes]]:
        sha = repo.refs.get(rev, rev)
        if sha not in repo.commits:
            raise Stop(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return sha, repo.commits[sha]

    # --- the API ---

    def whoami(self) -> None:
        if (user := self.user()) is None:
            raise Stop(401, message="Invalid credentials in Authorization header")
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in user.orgs.items()]
        self.answer({"type": "user", "name": user.name, "fullname": user.name, "orgs": orgs, "auth": {"type": "oauth"}})

    def create(self) -> None:
        wanted, user = json.loads(self.body), self.user()
        if user is None or not user.scopes & {"write-repos", "contribute-repos"}:
            raise Stop(403, message="Your token does not have the required scope: contribute-repos")
        owner = wanted.get("organization") or user.name
        if owner != user.name and user.orgs.get(owner) not in ("write", "admin", "contributor"):
            raise Stop(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{wanted['name']}"
        if repo_id in self.hub.repos:
            raise Stop(409, message="You already created this model repo")
        self.hub.add_repo(repo_id, private=wanted.get("visibility") == "private", created_with=user.scopes)
        self.answer({"url": f"{self.hub.url}/{repo_id}"})

    def validate(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def auth_check(self, id: str) -> None:
        self.readable(id)
        self.answer({})

    def model(self, id: str, rev: str = "main") -> None:
        repo = self.readable(id, content=False)
        sha, files = self.snapshot(repo, rev)
        state = {"private": repo.private, "gated": "manual" if repo.gated else False, "cardData": repo.card}
        siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
        self.answer({"id": id, "modelId": id, "sha": sha, "siblings": siblings, "tags": [], **state})

    def search(self) -> None:
        found = [id for id, repo in self.hub.repos.items() if self.query.get("search", "") in id and not repo.private]
        self.answer([{"id": id, "modelId": id} for id in found])

    def tree(self, id: str, rev: str) -> None:
        _, files = self.snapshot(self.readable(id), rev)
        self.answer([self.entry(path, data) for path, data in sorted(files.items())])

    def entry(self, path: str, data: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path.endswith(".safetensors"):
            oid, size = hashlib.sha256(data).hexdigest(), len(data)
            if data.startswith(b"xet:"):  # it is in Xet, here is only its name
                _, oid, size = data.decode().split(":")
                entry |= {"xetHash": self.hub.xet_hashes[oid], "size": int(size)}
            entry["lfs"] = {"oid": oid, "size": int(size), "pointerSize": 130}
        return entry

    def preupload(self, id: str, rev: str) -> None:
        repo = self.writable(id)
        _, files = self.snapshot(repo, "main" if rev not in repo.refs else rev)
        answers = []
        for file in json.loads(self.body)["files"]:
            entry = self.entry(file["path"], files[file["path"]]) if file["path"] in files else {}
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            known = entry["lfs"]["oid"] if "lfs" in entry else entry.get("oid")
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.answer({"files": answers})

    def batch(self, id: str) -> None:
        self.writable(id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            actions = {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.lfs else actions))
        self.answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Stop(400, message="content does not have the promised SHA-256")
        self.hub.lfs[oid] = self.body
        self.answer({})

    def verify(self) -> None:
        oid = json.loads(self.body)["oid"]
        if oid not in self.hub.lfs:
            raise Stop(404, message="no such object")
        self.answer({})

    def commit(self, id: str, rev: str) -> None:
        repo = self.writable(id)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", repo.refs[rev]) != repo.refs[rev]:
            raise Stop(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.refs[rev]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs and not self.hub.xet_folder:
                    raise Stop(400, message=f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.lfs.get(value["oid"], f"xet:{value['oid']}:{value['size']}".encode())
            else:
                del files[value["path"]]
        number = len(repo.pull_requests) + 1
        ref = f"refs/pr/{number}" if "create_pr" in self.query else rev
        sha = repo.commit(ref, files, header["summary"])
        page = f"{self.hub.url}/{id}/discussions/{number}"
        if ref != rev:
            author = {"name": self.user().name}
            about = {
                "num": number,
                "title": header["summary"],
                "status": "open",
                "isPullRequest": True,
                "repo": {"name": id, "type": "model"},
            }
            repo.pull_requests.append(about | {"author": author, "createdAt": "2026-01-01T00:00:00.000Z"})
        self.answer({"commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha, "pullRequestUrl": page})

    def discussions(self, id: str) -> None:
        repo = self.readable(id)
        self.answer({"discussions": repo.pull_requests, "count": len(repo.pull_requests), "start": 0})

    def xet_token(self, id: str, rev: str) -> None:
        self.readable(id)
        place, expiry = f"local://{self.hub.xet_folder}", str(int(time.time()) + 3600)
        headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "for-xet", "X-Xet-Token-Expiration": expiry}
        self.answer({"casUrl": place, "exp": int(expiry), "accessToken": "for-xet"}, **headers)

    def resolve(self, id: str, rev: str, path: str) -> None:
        sha, files = self.snapshot(self.readable(id), rev)
        if path not in files:
            raise Stop(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        data, entry = files[path], self.entry(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        if "xetHash" in entry:
            route = f"{self.hub.url}/api/models/{id}/xet-read-token/{sha}"
            headers |= {"X-Xet-Hash": entry["xetHash"], "X-Xet-Refresh-Route": route}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(wanted[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(data[first:], 206, **headers)
        self.answer(data, Content_Type="application/octet-stream", **headers)
