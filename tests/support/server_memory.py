"""Job after job on one page of the app, and what the server's memory is after each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
from app_server import AppServer
from browsing import Visitor

SETTLING_SECONDS = 1.0  # in which a finished job's memory is given back


def memory_after_jobs(server: AppServer, visitor: Visitor, jobs: int) -> Iterator[int]:
    """Quantize and draw one pair, `jobs` times with another seed; resident bytes of the server after each."""
    field = visitor.page.locator("#seed input")
    for seed in range(jobs):
        field.fill(str(seed))
        field.blur()
        visitor.see("#command", f"--seed {seed} ")
        visitor.press("#start")
        visitor.see("#progress .done", f"seed {seed} is packed")
        visitor.see("#drawn", f"seed {seed} is packed. Press Draw pairs")
        visitor.press("#draw")
        visitor.see("#figures", "noise error")
        time.sleep(SETTLING_SECONDS)
        yield psutil.Process(server.process.pid).memory_info().rss
