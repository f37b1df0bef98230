"""Which requests reach the page: those it makes itself, and those of programs that use its two endpoints.

Gradio serves more than our page has: uploads, a proxy, recordings, links that are kept on disk. What is not on the list here is
not there. At home the app holds its user's login, and every web site the user visits may send requests to it: so a request must
name this machine (a site that lets its own name point here does not), and must not come from another site's page.
"""

from __future__ import annotations

import os
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LARGEST_BODY = 1_000_000  # bytes of a request: a few settings, never a file
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
READ = re.compile(
    r"/(config/?|theme\.css|favicon\.ico|preview\.png|robots\.txt|manifest\.json|pwa_icon(/\d+)?|(static|assets|svelte)/.+"
    r"|login/huggingface|login/callback|logout"
    r"|gradio_api/(app_id/?|startup-events|info/?|openapi\.json|user/?|login_check/?|token/?|theme\.css|heartbeat/\w+"
    r"|queue/(data|status)|call/\w+/\w+|file=(?!\w\w+:).+|mcp(/.*)?))?"
)
WRITE = re.compile(r"/gradio_api/(queue/join|(call|call/v2|run|api)/\w+/?|cancel|reset/?|mcp(/.*)?)")
# What another reader of the same path may take for another path: steps up, empty names, what is encoded twice, backslashes
# (of which Windows makes the names of the pictures that we serve).
AMBIGUOUS = re.compile(r"[/\\]\.{1,2}([/\\]|$)|//|%|[\x00-\x1f\x7f]" + ("" if os.name == "nt" else r"|\\"))


def gates(host: str | None) -> list[Middleware]:
    """What stands before the page, the outermost first.

    Args:
        host: the address that the app listens on, as its user named it: requests must be to it, or to this machine by one of
            its own names. None where the page's names are not known here: behind a proxy, a public link, on all addresses.
    """
    doors = Middleware(OnlyOurDoors)
    if host is None:
        return [doors]
    names = {*LOOPBACK, host}
    if host not in LOOPBACK:
        names |= {own := socket.gethostname(), f"{own}.local"}
    return [Middleware(TrustedHostMiddleware, allowed_hosts=sorted(names), www_redirect=False), Middleware(SameSite), doors]


class OnlyOurDoors:
    """Answer 404 to everything that neither the page nor its endpoints use, and 413 to what is too large for them."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or not is_door(scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))):
            return await _refuse(404, "There is nothing here.", scope, receive, send)
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            return await _refuse(413, "This is larger than anything the page sends.", scope, receive, send)
        await self.app(scope, _bounded(receive), send)


def is_door(method: str, path: str) -> bool:
    """Whether a request like this (its path decoded once) belongs to the page or its endpoints."""
    if AMBIGUOUS.search(path):
        return False
    if method in ("GET", "HEAD", "OPTIONS"):
        return bool(READ.fullmatch(path))
    return bool(WRITE.fullmatch(path)) if method == "POST" else method == "DELETE" and path.startswith("/gradio_api/mcp")


def _bounded(receive: Receive) -> Receive:
    """A body may come without its length: then it is over where it grows too large."""
    seen = 0

    async def bounded() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return {"type": "http.disconnect"} if seen > LARGEST_BODY else message

    return bounded


class SameSite:
    """Answer 403 to what another site's page sent: browsers say whose page it was, other programs do not.

    A link from elsewhere may still open the page.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not is_from_here(scope.get("method", "GET"), Headers(scope=scope)):
            return await _refuse(403, "This page answers only itself: open it at its own address.", scope, receive, send)
        await self.app(scope, receive, send)


def is_from_here(method: str, headers: Headers) -> bool:
    """Whether a request was made by our own page, by the user's hand, or by a program that is no browser."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        return False
    opened = method == "GET" and headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return opened or headers.get("sec-fetch-site", "none") in ("none", "same-origin")


async def _refuse(status: int, said: str, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": said})
    await PlainTextResponse(said, status_code=status)(scope, receive, send)
