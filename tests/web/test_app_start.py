"""`python app.py`: its arguments, the public link, and what programs find."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

import gradio as gr
import pytest
from app_server import HOME, AppServer
from browsing import PATIENCE

NO_NETWORK = {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}


def test_help_names_every_argument_and_comes_at_once():
    shown = subprocess.run(
        [sys.executable, "app.py", "--help"], cwd=HOME, check=True, capture_output=True, text=True, timeout=10
    )
    for argument in ("--host", "--port", "--share", "--root"):
        assert argument in shown.stdout


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """app.py listens for Ctrl-C and chooses where files are served from; here in the process of the tests."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "served"))
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def functions_of_the_app(monkeypatch, **environment) -> dict:
    for name in ("SPACE_ID", "VQ4DIT_WORKSPACE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    return runpy.run_path(str(HOME / "app.py"))


def test_the_workspace_is_on_the_persistent_disk_only_on_a_space(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # there is a /data that can be written to
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    at_home = functions_of_the_app(monkeypatch)["workspace_folder"]()
    assert at_home.parent == tmp_path and at_home.stat().st_mode & 0o777 == 0o700
    chosen = functions_of_the_app(monkeypatch, VQ4DIT_WORKSPACE=str(tmp_path / "mine"))["workspace_folder"]()
    assert chosen == tmp_path / "mine"
    on_a_space = functions_of_the_app(monkeypatch, SPACE_ID="ann/demo")["workspace_folder"]()
    assert str(on_a_space) == "/data/vq4dit"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert functions_of_the_app(monkeypatch, SPACE_ID="ann/demo")["workspace_folder"]().parent == tmp_path


def test_a_folder_that_somebody_else_laid_there_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    own = functions_of_the_app(monkeypatch)["workspace_folder"]()
    own.rmdir()
    (tmp_path / "theirs").mkdir()
    own.symlink_to(tmp_path / "theirs")
    with pytest.raises(SystemExit, match="belongs to somebody else: name another folder"):
        functions_of_the_app(monkeypatch)["workspace_folder"]()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ([], "127.0.0.1"),
        (["--host", "box.lan"], "box.lan"),
        (["--host", "0.0.0.0"], None),
        (["--host", "::"], None),
        (["--share"], None),
    ],
    ids=str,
)
def test_requests_must_be_to_the_address_that_its_user_named(arguments, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    app = functions_of_the_app(monkeypatch)
    assert app["own_name"](app["parse"]()) == name
    app = functions_of_the_app(monkeypatch, SPACE_ID="ann/demo")
    assert app["own_name"](app["parse"]()) is None


@pytest.mark.parametrize("arguments", [[], ["--share"], ["--host", "0.0.0.0", "--port", "7999"]], ids=" ".join)
def test_arguments_reach_the_server(arguments, monkeypatch, tmp_path):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **settings: launched.update(settings))
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    monkeypatch.setenv("VQ4DIT_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")  # app.py may set it; now it is put back afterwards
    runpy.run_path(str(HOME / "app.py"), run_name="__main__")
    assert launched["share"] is ("--share" in arguments)
    assert (launched["server_name"], launched["server_port"]) == (
        ("0.0.0.0", 7999) if "--host" in arguments else ("127.0.0.1", 7860)
    )


@pytest.mark.slow
def test_without_a_network_share_says_so_and_the_page_works_here(tmp_path):
    with AppServer(tmp_path / "jobs", "--share", PYTHONUNBUFFERED="1", **NO_NETWORK) as server:
        end = time.monotonic() + PATIENCE
        while "Could not create share link" not in server.log.read_text():
            assert server.process.poll() is None and time.monotonic() < end, server.log.read_text()
            time.sleep(0.1)
        assert "Please check your internet connection" in server.log.read_text() and server.answers()
        assert "Traceback" not in server.log.read_text()
        info = json.loads(urllib.request.urlopen(f"{server.url}gradio_api/info").read())
        assert set(info["named_endpoints"]) == {"/inspect", "/estimate"} and not info["unnamed_endpoints"]
        assert estimate_of(server, "assets/emoji-dit")["fits"]["anonymous"] in (True, False)


@pytest.mark.slow
def test_mcp_offers_the_same_two(tmp_path):
    with AppServer(tmp_path / "jobs", GRADIO_MCP_SERVER="True") as server:
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        request = urllib.request.Request(f"{server.url}gradio_api/mcp/", body, headers)
        answer = urllib.request.urlopen(request).read().decode()
        tools = json.loads(answer.split("data: ")[1])["result"]["tools"]
        assert {tool["name"] for tool in tools} == {"inspect", "estimate"}


def estimate_of(server: AppServer, model: str) -> dict:
    """Ask as a program does."""
    call = f"{server.url}gradio_api/call/estimate"
    body = json.dumps({"data": [model, 2, "kmeans"]}).encode()
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    event = json.loads(urllib.request.urlopen(request).read())["event_id"]
    answer = urllib.request.urlopen(f"{call}/{event}").read().decode()
    return json.loads(answer.split("data: ")[1])[0]
