"""The server gives back what a job took: a short form of `tests/benchmarks/memory.py`."""

from __future__ import annotations

import pytest
from app_server import AppServer
from browsing import Visitor, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from server_memory import memory_after_jobs

pytestmark = [needs_chromium, pytest.mark.slow]


def test_memory_is_flat_over_jobs(tmp_path, root, browser):
    with AppServer(tmp_path / "jobs", "--root", str(root)) as server:
        visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans")
        after = list(memory_after_jobs(server, visitor, 10))
    assert after[-1] <= 1.15 * after[4], [f"{num_bytes / 1e6:.0f} MB" for num_bytes in after]
    assert visitor.errors == []
