"""`python app.py`: its arguments, the public link, and what programs find."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
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
