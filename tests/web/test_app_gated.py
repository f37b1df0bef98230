"""A gated base on a ZeroGPU Space, in a real browser: whose login has access works with it, everybody else reads why not.

The login travels with each event, into the GPU's worker too, and leaves no trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from app_server import AppServer
from browsing import Visitor, needs_chromium, new_browser  # noqa: F401  fixtures
from space import new_hub, new_place, settings, sign_in, token_of, traces_of  # noqa: F401  fixtures
from test_app_zero_gpu import permission
from zero_gpu_scheduler import Scheduler

pytestmark = [needs_chromium, pytest.mark.slow]

GATED = "corp/gated-tiny"


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Scheduler]:
    with Scheduler() as found:
        yield found


@pytest.fixture(scope="module")
def server(place, hub, scheduler) -> Iterator[AppServer]:
    folder = place / "root" / "tiny"
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.add_repo(GATED, files, gated=True, readers={"ann"}, card={"license": "apache-2.0"})
    lent = {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": scheduler.url, "VQ4DIT_SLICE_SECONDS": "3"}
    with AppServer(place / "jobs", program="tests/support/zero_gpu_app.py", **settings(place, hub), **lent) as found:
        yield found


def new_visitor(browser, server) -> Visitor:
    found = Visitor(browser, server.url, extra_http_headers={"x-ip-token": permission()})
    return found.arrive(f"?model={GATED}&recipe=kmeans&seed=0")


def is_refused(visitor: Visitor, hub, element: str, headline: str = "This model is gated") -> None:
    visitor.see(f"{element} .trouble", headline)
    visitor.see(f"{element} .trouble", f"{GATED} is gated, and this login has no access.")
    assert visitor.page.locator(f"{element} .trouble a").get_attribute("href") == f"{hub.url}/{GATED}"


def test_a_gated_base_is_worked_with_by_those_who_have_access_and_by_nobody_else(server, place, browser, hub, scheduler):
    ann = new_visitor(browser, server)
    is_refused(ann, hub, "#card")  # not signed in yet
    sign_in(ann)
    ann.see("#card .card", "gated, and your login may read it")
    ann.press("#start")
    ann.see("#progress .done", "is packed")
    ann.press("#draw")
    ann.see("#figures", "noise error")
    assert len(scheduler.leases) >= 2
    (origin,) = place.glob("jobs/*/*/result/gated-tiny-2bit/vq4dit.json")
    base = json.loads(origin.read_text())
    assert (base["model"], base["revision"]) == (GATED, hub.repos[GATED].refs["main"])
    ann.see("#push-private", f"Private at first: its base {GATED} is gated.")
    ann.press("#push")
    ann.see("#pushed .done", "ann/gated-tiny-vq4dit-2bit")
    repo = hub.repos["ann/gated-tiny-vq4dit-2bit"]
    assert repo.private and hub.repos[GATED].refs["main"] in repo.head["README.md"].decode()

    of_ann, leases = token_of(hub), len(scheduler.leases)
    hub.login.user_name = "bob"
    for name in ("bob", "nobody"):  # the files, the card and the pipeline are in the server's caches now
        visitor = new_visitor(browser, server)
        if name == "bob":
            sign_in(visitor, "bob")
            visitor.see("#who", "Signed in as bob.")
        is_refused(visitor, hub, "#card")
        visitor.press("#start")
        is_refused(visitor, hub, "#progress")
        assert "Traceback" not in visitor.page.content()
    visitor.shoot("5-gated", "#pick")
    assert len(scheduler.leases) == leases, "no GPU was lent for it"
    assert list(place.glob("home/hub/models--corp--gated-tiny/snapshots/*/model_index.json"))

    hub.repos[GATED].readers.clear()  # ann's access is withdrawn: what she has stays, nothing new is made
    ann.page.locator("#labels input").click()
    ann.page.keyboard.press("Backspace")
    ann.press("#draw")
    is_refused(ann, hub, "#drawn", "The pairs could not be drawn")

    pushed = b"".join(data for files in repo.commits.values() for data in files.values())
    assert (place / "jobs.log").stat().st_size and len(hub.users) == 2
    for token in (of_ann, token_of(hub)):
        assert len(token) > 30 and token.encode() not in pushed and traces_of(token, place) == []
        assert not any(token in request for request in hub.requests)


def test_gated_is_told_from_missing(server, browser, hub):
    visitor = Visitor(browser, server.url).arrive("?model=corp/none")
    visitor.see("#card .trouble", "It is not there, or it is private")
    assert visitor.page.locator("#card .trouble a").count() == 0
