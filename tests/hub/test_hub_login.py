"""Logins through Gradio's own OAuth: the token a login yields is the one a push accepts, and it stays nowhere."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hub_environment import HOME, PORT, free_port

ROOT = Path(__file__).parents[2]
SCOPES = "openid profile contribute-repos gated-repos"


@contextmanager
def page(tmp_path, folder, provider: str, client_id: str, secret: str):
    """The address of a running page whose login is at `provider`; its output goes to page.log."""
    port = free_port()
    settings = {"SYSTEM": "spaces", "SPACE_ID": "me/demo", "OAUTH_CLIENT_ID": client_id, "OAUTH_CLIENT_SECRET": secret}
    settings |= {"OAUTH_SCOPES": SCOPES, "OPENID_PROVIDER_URL": provider, "GRADIO_ANALYTICS_ENABLED": "False"}
    settings |= {"HF_ENDPOINT": f"http://127.0.0.1:{PORT}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    settings |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HF_HUB_VERBOSITY": "debug", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "support" / "login_app.py"), str(port), str(folder)]
    with open(tmp_path / "page.log", "w") as log:
        with subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log) as process:
            try:
                yield wait_for(f"http://127.0.0.1:{port}", process, tmp_path / "page.log")
            finally:
                process.kill()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> str:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            httpx.get(address)
            return address
        except httpx.HTTPError:
            time.sleep(0.1)
    raise TimeoutError(log.read_text())


class Visitor:
    """A browser's part of a login: follows redirects and keeps secure cookies, which plain clients drop on http."""

    def __init__(self, address: str):
        self.address, self.cookies = address, dict[str, str]()

    def get(self, url: str, **post) -> httpx.Response:
        cookies = {"Cookie": "; ".join(f"{key}={value}" for key, value in self.cookies.items())}
        headers = cookies if url.startswith(self.address) else {}
        method = "POST" if post else "GET"
        answer = httpx.request(method, url, headers=headers, timeout=60, **post)
        for line in answer.headers.get_list("set-cookie"):
            if url.startswith(self.address):
                name, _, value = line.split(";")[0].partition("=")
                self.cookies[name] = value
        return answer

    def sign_in(self, consent: dict | None = None) -> None:
        answer = self.get(f"{self.address}/login/huggingface")
        if consent:  # a provider that asks: answer its form, then go back with its code
            answer = self.get(answer.headers["Location"], data=consent)
        while "Location" in answer.headers:
            answer = self.get(str(answer.url.join(answer.headers["Location"])))
        assert answer.status_code == 200, answer.text

    def call(self, name: str, *values: str) -> str:
        event = self.get(f"{self.address}/gradio_api/call/{name}", json={"data": values}).json()["event_id"]
        answer = self.get(f"{self.address}/gradio_api/call/{name}/{event}").text
        return json.loads(answer.split("data: ")[-1].splitlines()[0])[0]


def files_with(text: str, *folders: Path) -> list[Path]:
    paths = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in paths if text.encode() in path.read_bytes()]


def test_a_login_at_the_hub_can_push_and_its_token_stays_nowhere(hub, quantized_folder, tmp_path):
    hub.login.orgs = {"acme": "write", "museum": "read"}
    with page(tmp_path, quantized_folder, hub.url, hub.login.client_id, hub.login.client_secret) as address:
        visitor = Visitor(address)
        assert visitor.call("publish", "tiny") == "sign in first"
        visitor.sign_in()
        assert visitor.call("name") == "ann"
        assert visitor.call("publish", "tiny") == f"{hub.url}/ann/tiny ann acme"
        assert hub.repos["ann/tiny"].private and "README.md" in hub.repos["ann/tiny"].head
        hub.add_repo("ann/older", {"config.json": b"{}"})
        assert visitor.call("publish", "ann/older").startswith("exists:")
        assert visitor.call("publish", "museum/tiny").startswith("organization:")
        (token,) = hub.users
        hub.users[token].expires_at = 0
        assert visitor.call("publish", "tiny-2").startswith("login: sign in: the login has expired or was revoked")
        visitor.get(f"{address}/logout")
        assert visitor.call("name") == "nobody" and visitor.call("publish", "tiny") == "sign in first"
        hub.login.lifetime = 30.0
        visitor.sign_in()
        assert visitor.call("publish", "tiny-2").startswith("login: the login has expired, or will within a minute")
    assert "ann/tiny-2" not in hub.repos and len(token) > 30
    pushed = b"".join(data for repo in hub.repos.values() for files in repo.commits.values() for data in files.values())
    assert token.encode() not in pushed and not any(token in request for request in hub.requests)
    assert (tmp_path / "page.log").stat().st_size and files_with(token, tmp_path, quantized_folder, Path(HOME.name)) == []


def test_a_login_at_an_independent_provider(hub, quantized_folder, tmp_path):
    mock = pytest.importorskip("oidc_provider_mock")
    claims = {"preferred_username": "bob", "name": "Bob", "profile": "http://x/bob", "picture": "http://x/bob.png"}
    users = [mock.User(sub="bob", claims=claims)]
    with mock.run_server_in_thread(port=free_port(), user_claims=users) as server:
        provider = f"http://127.0.0.1:{server.server_port}"
        with page(tmp_path, quantized_folder, provider, "cid", "sec") as address:
            visitor = Visitor(address)
            visitor.sign_in(consent={"sub": "bob"})
            assert visitor.call("name") == "bob"
            assert visitor.call("publish", "tiny").startswith("login:"), "its token is none of the Hub's"
