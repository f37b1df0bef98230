"""A double of ZeroGPU's scheduler on loopback: it lends a device that does not exist to the real `spaces` package.

`refuse` holds answers for the next requests, first come, first served; `leases` counts what was lent. With `kill_after`
set, the next worker is killed so many seconds after it was let on the device: in the middle of a turn, not between two.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

QUOTA = (429, {"left": 3, "wait": 12300})
EXPIRED = (401, {})
NO_GPU = (503, {})


class Scheduler:
    def __init__(self) -> None:
        self.refuse: list[tuple[int, dict]] = []
        self.leases: list[dict[str, str]] = []
        self.kill_after: float | None = None
        self.released = 0
        scheduler = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                status, content = scheduler.answer(url.path, query)
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, query: dict[str, str]) -> tuple[int, dict]:
        if path == "/schedule":
            if self.refuse:
                return self.refuse.pop(0)
            self.leases.append(query)
            return 200, {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "x", "allowToken": f"t{len(self.leases)}"}
        if path == "/allow" and self.kill_after is not None:
            threading.Timer(self.kill_after, os.kill, [int(query["pid"]), signal.SIGKILL]).start()
            self.kill_after = None
        if path == "/release":
            self.released += 1
        return 200, {}

    def __enter__(self) -> Scheduler:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
