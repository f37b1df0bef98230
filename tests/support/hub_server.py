"""A Hub on loopback: it speaks the protocol of huggingface_hub's client, keeps repositories in memory, and breaks on demand.

    with Hub() as hub:                                    # in the environment: HF_ENDPOINT=hub.url
        token = hub.add_user("ann", orgs=["acme"])
        hub.fail("PUT /lfs/", status=500, after=1)        # the second upload of a file
        ...
        hub.repos["ann/model"].head                       # {"path": bytes}

`hub_protocol.py` answers the requests. `hub_login.py` is the OpenID provider: the token that a login yields is one of
`hub.users`, with its scopes and expiry.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer

import hub_login
from hub_protocol import Handler


@dataclass
class User:
    """Who a token belongs to, and what it may do."""

    name: str
    orgs: dict[str, str]  # name -> role
    scopes: set[str]
    expires_at: float


@dataclass
class Repo:
    """Snapshots by commit; every file is its bytes, large ones are looked up in `Hub.lfs` by their SHA-256."""

    private: bool = False
    gated: bool = False
    created_with: set[str] = field(default_factory=set)  # scopes of the token that made it
    readers: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    card: dict = field(default_factory=dict)
    pull_requests: list[dict] = field(default_factory=list)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages.append(message)
        self.refs[ref] = sha
        return sha


@dataclass
class Fault:
    """What goes wrong with requests whose "METHOD /path?query" matches; the first `after` of them are spared."""

    request: str
    status: int = 0
    code: str = ""  # X-Error-Code
    message: str = ""  # X-Error-Message
    headers: dict[str, str] = field(default_factory=dict)
    cut: str = ""  # hang up "receiving" half of the body, "before" or "after" doing the work, having sent "half" the answer
    then: Callable[[], None] = lambda: None  # called when it hangs up
    slow: float = 0  # seconds for every 16 kB that are received
    after: int = 0
    times: int = 1


class Hub:
    """The server, in a thread of its own while the `with` lasts."""

    def __init__(self, port: int = 0, xet_folder: str = ""):
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.xet_folder, self.xet_hashes = xet_folder, dict[str, str]()  # SHA-256 -> Xet hash
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.login = hub_login.Provider(self)
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add_user(self, name: str, orgs=(), scopes=("write-repos", "gated-repos"), seconds: float = 1e9) -> str:
        """A user; returns a token that looks like the real ones."""
        token = f"hf_{hashlib.sha256(f'{name}{len(self.users)}'.encode()).hexdigest()[:34]}"
        roles = dict(orgs) if isinstance(orgs, dict) else dict.fromkeys(orgs, "write")
        self.users[token] = User(name, roles, set(scopes), time.time() + seconds)
        return token

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **settings) -> Repo:
        repo = self.repos[repo_id] = Repo(**settings)
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n", **(files or {})}, "initial commit")
        return repo

    def fail(self, request: str, **settings) -> Fault:
        self.faults.append(Fault(request, **settings))
        return self.faults[-1]

    def fault_of(self, request: str) -> Fault:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if re.search(fault.request, request) and fault.times:
                    if not fault.after:
                        fault.times -= 1
                        return fault
                    fault.after -= 1
        return Fault("")

    def count(self, request: str) -> int:
        return sum(bool(re.search(request, seen)) for seen in self.requests)
