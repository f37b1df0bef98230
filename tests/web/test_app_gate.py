"""Which requests reach the app: real ones, to a real server, as a browser, a program or another web site would send them."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request

import gradio as gr
import pytest
from app_server import HOME, AppServer
from starlette.datastructures import Headers

from vq4dit.web.gate import LARGEST_BODY, OnlyOurDoors, gates, is_door, is_from_here

pytestmark = pytest.mark.slow
BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}
FILE = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.txt"\r\n\r\nhello\r\n--b--\r\n'
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with AppServer(tmp_path_factory.mktemp("gate") / "jobs") as found:
        yield found


def ask(server: AppServer, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and text; `Host` and other headers as given, their underscores as dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value.replace("PORT", str(server.port)) for name, value in headers.items()}
    connection.putrequest(method, path, skip_host="Host" in named)
    for name, value in named.items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = "" if "event-stream" in answer.headers.get("Content-Type", "") else answer.read().decode(errors="replace")
    connection.close()
    return answer.status, text


def files_below(*folders) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_nothing_can_be_uploaded_and_nothing_is_written(server):
    served = server.workspace.with_suffix(".served")
    before = files_below(served)
    for path in ("upload", "upload?upload_id=x", "upload/", "process_recording", "component_server", "component_server/"):
        assert ask(server, "POST", f"/gradio_api/{path}", FILE, **BOUNDARY)[0] == 404
    assert files_below(served) == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/upload_progress?upload_id=x"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/x"),
        ("GET", "/gradio_api/file=HTTP%3A//127.0.0.1:1/x"),
        ("GET", "/gradio_api/file//etc/passwd"),
        ("GET", "/gradio_api/deep_link?session_hash=x"),
        ("GET", "/gradio_api/stream/a/b/c/playlist.m3u8"),
        ("POST", "/gradio_api/stream/a"),
        ("POST", "/gradio_api/stream/a/close"),
        ("POST", "/gradio_api/run-history/connect"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("GET", "/gradio_api/dev/reload"),
        ("GET", "/gradio_api/custom_component/1/client/x/y.js"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/vibe-code"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/monitoring"),
        ("GET", "/gradio_api/runs"),
        ("POST", "/login"),
        ("GET", "/docs"),
        ("GET", "//gradio_api/upload_progress?upload_id=x"),
        ("PUT", "/"),
        ("DELETE", "/gradio_api/queue/join"),
    ],
)
def test_what_the_page_never_uses_is_not_there(server, method, path):
    assert ask(server, method, path, b"{}" if method == "POST" else None, **JSON) == (404, "There is nothing here.")


def test_files_of_this_machine_are_not_served(server):
    assert ask(server, "GET", f"/gradio_api/file={server.workspace}.log")[0] in (403, 404)


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/info", "/gradio_api/app_id", "/theme.css", "/gradio_api/openapi.json"]
)
def test_what_the_page_and_programs_need_is_there(server, path):
    assert ask(server, "GET", path)[0] == 200


def test_a_request_larger_than_any_setting_is_refused_with_and_without_its_length(server):
    large = json.dumps({"data": ["x" * (LARGEST_BODY + 1)]}).encode()
    assert ask(server, "POST", "/gradio_api/call/inspect", large, **JSON)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/gradio_api/call/inspect", iter([large]), JSON, encode_chunked=True)
        assert connection.getresponse().status >= 400
    except (http.client.HTTPException, OSError):
        pass  # hung up on
    finally:
        connection.close()
    assert server.answers()


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST:PORT", "[::1]:PORT"])
def test_the_names_of_this_machine_are_answered(server, host):
    assert ask(server, "GET", "/gradio_api/app_id", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:PORT", "127.0.0.1.evil.example:PORT", "localhost.evil.example", "[::2]:PORT", "", "a@b"],
)
@pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/data?session_hash=x", "/static/x.js"])
def test_a_site_whose_name_points_here_reaches_nothing(server, host, path):
    """DNS rebinding: the browser believes that this machine is that site, and says so."""
    assert ask(server, "GET", path, Host=host)[0] == 400
    assert ask(server, "POST", "/gradio_api/queue/join", b"{}", Host=host, Origin=f"http://{host}", **JSON)[0] == 400


OTHERS = [
    {"Origin": "http://evil.example"},
    {"Origin": "http://127.0.0.1.evil.example:PORT"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:PORT"},  # another site than 127.0.0.1
    {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
]


@pytest.mark.parametrize("headers", OTHERS, ids=lambda headers: " ".join(headers.values()))
def test_another_sites_page_neither_asks_nor_listens(server, headers):
    body = json.dumps({"data": ["assets/emoji-dit"]}).encode()
    for path in ("/gradio_api/call/inspect", "/gradio_api/queue/join", "/gradio_api/cancel"):
        assert ask(server, "POST", path, body, **JSON, **headers)[0] == 403
        assert ask(server, "POST", path, body, **headers, Content_Type="text/plain")[0] == 403  # needs no preflight
    for path in ("/gradio_api/queue/data?session_hash=x", "/gradio_api/heartbeat/x", "/config"):
        assert ask(server, "GET", path, **headers)[0] == 403


def test_a_link_from_another_site_opens_the_page(server):
    followed = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert ask(server, "GET", "/?model=assets/emoji-dit", **followed)[0] == 200
    assert ask(server, "POST", "/gradio_api/queue/join", b"{}", **JSON, **followed)[0] == 403


def test_the_pages_own_requests_and_programs_are_answered(server):
    own = {"Origin": "http://127.0.0.1:PORT", "Sec_Fetch_Site": "same-origin"}
    for headers in (own, {}):
        body = json.dumps({"data": ["assets/emoji-dit"]}).encode()
        status, text = ask(server, "POST", "/gradio_api/call/inspect", body, **JSON, **headers)
        assert status == 200 and re.fullmatch(r'\{"event_id":"\w+"\}', text)


def test_a_websocket_is_closed(server):
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec_WebSocket_Version": "13"}
    key = {"Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert ask(server, "GET", "/gradio_api/queue/data", **upgrade, **key)[0] >= 400


# --- whose names ---


@pytest.mark.parametrize(
    ("host", "named", "other"),
    [
        ("192.168.1.5", "192.168.1.5:7860", "192.168.1.6:7860"),
        ("box.lan", "box.lan:80", "evil.example"),
        ("[::1]", "[::1]:1", "[::2]:1"),
    ],
)
def test_the_name_that_its_user_gave_is_answered_and_others_are_not(host, named, other):
    app = gr.routes.App(middleware=gates(host))

    @app.get("/config")
    def config() -> str:
        return "here"

    from starlette.testclient import TestClient

    for asked, status in ((named, 200), ("localhost:7860", 200), (other, 400)):
        assert TestClient(app).get("/config", headers={"host": asked}).status_code == status


def test_where_the_name_is_not_known_only_the_doors_are_watched():
    """On a Space, with a public link, and on all addresses."""
    (only,) = gates(None)
    assert only.cls is OnlyOurDoors


def test_doors_are_matched_whole():
    assert is_door("GET", "/") and is_door("HEAD", "/static/a/b.js") and is_door("POST", "/gradio_api/queue/join")
    for path in ("/config.json", "/gradio_api/queue/join/../upload", "/x/gradio_api/queue/join", "/gradio_api/upload\n"):
        assert not is_door("POST", path) and not is_door("GET", path)


def test_a_program_that_is_no_browser_says_nothing_and_is_answered():
    assert is_from_here("POST", Headers({"host": "127.0.0.1:7860"}))
    assert is_from_here("POST", Headers({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}))
    assert not is_from_here("POST", Headers({"origin": "http://127.0.0.1:7860"}))


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/mcp/../upload",
        "/gradio_api/mcp/..",
        "/gradio_api/mcp/./x",
        "/gradio_api/mcp//upload",
        "/gradio_api/mcp/..\\upload",
        "/gradio_api/mcp/%2e%2e/upload",
        "/gradio_api/mcp/%2E./upload",
        "/gradio_api/mcp/x%2fy",
        "/gradio_api/mcp/x%5c..",
        "/gradio_api/mcp/x\0",
        "/static/../config",
        "/static/a/../../gradio_api/upload",
        "/gradio_api/file=/tmp/../etc/passwd",
        "/gradio_api/file=//tmp/x",
        "/gradio_api/file=\\\\host\\share",
    ],
)
def test_a_path_that_others_may_read_in_another_way_is_no_door(path):
    for method in ("GET", "HEAD", "OPTIONS", "POST", "DELETE"):
        assert not is_door(method, path)


def test_pictures_and_tools_have_plain_paths():
    assert is_door("GET", "/gradio_api/file=/tmp/gradio/a.b/..c/cat-seed0.png") and is_door("POST", "/gradio_api/mcp/")
    assert is_door("GET", "/gradio_api/mcp/http/x") and is_door("DELETE", "/gradio_api/mcp/")


# --- what a shared link shows ---


def tags_of(page: str) -> dict[str, list[str]]:
    """What each meta tag with a name or a property says."""
    found: dict[str, list[str]] = {}
    for name, content in re.findall(r'<meta\s+(?:property|name)="([^"]+)"\s+content="([^"]*)"', page):
        found.setdefault(name, []).append(content)
    return found


@pytest.mark.parametrize(
    ("headers", "root"),
    [
        ({}, "http://127.0.0.1:PORT"),
        ({"X_Forwarded_Host": "someone-vq4dit.hf.space", "X_Forwarded_Proto": "https"}, "https://someone-vq4dit.hf.space"),
        ({"X_Forwarded_Host": '"><script>alert(1)</script>'}, None),
    ],
    ids=["at home", "behind a proxy", "hostile"],
)
def test_a_shared_link_shows_our_title_sentence_and_picture_once(server, headers, root):
    status, page = ask(server, "GET", "/", **headers)
    tags = tags_of(page)
    assert status == 200 and "Click to try out" not in page and "<script>alert" not in page
    for name in ("og:title", "og:description", "og:image", "twitter:image", "twitter:card", "description"):
        assert len(tags[name]) == 1 and tags[name][0], name
    assert "vq4dit" in tags["og:title"][0]
    if root:
        assert tags["og:image"] == [f"{root.replace('PORT', str(server.port))}/preview.png"]


def test_the_picture_of_a_link_and_the_icon_are_ours(server):
    for path, file in (("/preview.png", "assets/original-and-2bit.png"), ("/favicon.ico", "vq4dit/web/icon.png")):
        with urllib.request.urlopen(server.url.rstrip("/") + path) as answer:
            assert answer.headers["Content-Type"] == "image/png" and answer.read() == (HOME / file).read_bytes()
