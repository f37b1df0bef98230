"""What a link to the page shows where it is shared: our title, sentence and picture.

Gradio writes its own name and no picture into every page, twice. Its tags are taken out of the page on its way, and ours put in
their place: a picture needs a whole address, which only the request knows (a Space, a public link, somebody's own machine).
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from gradio.route_utils import get_root_url
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TITLE = "vq4dit: a diffusion transformer in a seventh of its bytes"
DESCRIPTION = "Pick an image or video model, choose 2, 3 or 4 bits per weight, watch it shrink, and see what that changed."
PICTURE = "/preview.png"
THEIRS = re.compile(rb'<meta\s+(?:property="og:|name="twitter:|name="description")[^>]*>\s*')
ICON = Path(__file__).with_name("icon.png")


class LinkPreview:
    """Serve the picture, and name it in the page."""

    def __init__(self, app: ASGIApp, picture: Path):
        self.app, self.picture = app, picture

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if path == PICTURE:
            return await FileResponse(self.picture)(scope, receive, send)
        if path in ("", "/") and scope["method"] == "GET":
            send = _Rewritten(send, get_root_url(Request(scope), "/", scope.get("root_path") or None))
        await self.app(scope, receive, send)


class _Rewritten:
    """Sends a page of HTML when it is whole, with our tags; anything else as it comes."""

    def __init__(self, send: Send, root: str):
        self.send, self.root = send, root
        self.start: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if MutableHeaders(raw=message["headers"]).get("content-type", "").startswith("text/html"):
                self.start = message
                return
        elif self.start is not None:
            self.body += message.get("body", b"")
            if message.get("more_body"):
                return
            page = with_preview(self.body, self.root)
            MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(page))
            await self.send(self.start)
            message = {"type": "http.response.body", "body": page}
        await self.send(message)


def with_preview(page: bytes, root: str) -> bytes:
    """The page with our tags in place of Gradio's.

    Args:
        root: the address at which it was asked for, without a slash at the end.
    """
    told = {"title": TITLE, "description": DESCRIPTION, "image": root + PICTURE}
    tags = [f'<meta property="og:{name}" content="{escape(text)}" />' for name, text in told.items()]
    tags += [f'<meta name="twitter:{name}" content="{escape(text)}" />' for name, text in told.items()]
    tags += [
        f'<meta property="og:url" content="{escape(root)}/" />',
        '<meta property="og:type" content="website" />',
        '<meta name="twitter:card" content="summary_large_image" />',
        f'<meta name="description" content="{escape(DESCRIPTION)}" />',
    ]
    return THEIRS.sub(b"", page).replace(b"</head>", "\n".join(tags).encode() + b"\n</head>", 1)
