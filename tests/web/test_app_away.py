"""People who look away: the page is reloaded, its tab closed, its telephone offline, while the job runs and while it waits.

The server owns queue and work, so neither the work nor the place is lost; and who comes back sees how it stands.
"""

from __future__ import annotations

import time

import pytest
from app_server import AppServer, made_by_the_command, weights
from browsing import PATIENCE, Visitor, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from playwright.sync_api import expect

from vq4dit.projects.project import Project
from vq4dit.projects.workspace import Workspace

pytestmark = [needs_chromium, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    with AppServer(tmp_path_factory.mktemp("away") / "jobs", "--root", str(root)) as found:
        yield found


def project_of(server: AppServer, seed: int) -> Project:
    """As it lies in the server's folder."""
    workspace = Workspace(server.workspace)
    found = [project for folder in server.workspace.iterdir() for project in workspace.projects(folder.name)]
    return next(project for project in found if project.settings.seed == seed)


def wait_for(project: Project, *phases: str) -> None:
    end = time.monotonic() + PATIENCE
    while project.status().phase not in phases:
        assert time.monotonic() < end, project.status()
        time.sleep(0.1)


def begin(server: AppServer, browser, seed: int, recipe: str = "paper", **settings) -> Visitor:
    visitor = Visitor(browser, server.url, **settings).arrive(f"?model=folder:tiny&recipe={recipe}&seed={seed}")
    visitor.press("#start")
    return visitor


def test_a_job_goes_on_while_its_page_is_reloaded_and_closed(server, browser, root, tmp_path):
    visitor = begin(server, browser, 21)
    visitor.see("#progress .running", "Calibrating")
    visitor.arrive()
    visitor.see("#welcome", "tiny-2bit")
    visitor.see("#progress .running", "Calibrating")
    expect(visitor.page.locator("#stop")).to_be_visible()
    expect(visitor.page.locator("#resume")).to_be_hidden()
    visitor.page.close()
    project = project_of(server, 21)
    steps = len(project.events())
    wait_for(project, "done")
    assert len(project.events()) > steps, "it went on though nobody looked on"
    visitor.reopen().arrive()
    visitor.see("#progress .done", "tiny-2bit · paper · seed 21 is packed")
    made = made_by_the_command(str(root / "tiny"), "--recipe", "paper", "--seed", "21")
    assert weights(visitor.download(tmp_path)) == made
    assert visitor.errors == []


def test_a_reloaded_page_sees_its_job_end_and_can_draw_and_the_pictures_outlive_a_reload(server, browser):
    visitor = begin(server, browser, 22)
    visitor.see("#progress .running", "Calibrating")
    visitor.arrive()
    visitor.see("#progress .done", "is packed")
    visitor.see("#drawn", "Press Draw pairs")
    visitor.open("#jobs-box")
    expect(visitor.page.locator("#jobs label")).to_contain_text("done")
    visitor.choose_seeds(4)
    visitor.press("#draw")
    visitor.see("#drawn", "Drawing: ")
    visitor.arrive()
    visitor.see("#figures", "noise error")
    visitor.see("#drawn", "12 pairs")
    expect(visitor.page.locator("#halt")).to_be_hidden()
    assert visitor.errors == []


def test_who_waits_keeps_the_place_and_a_stop_leaves_no_ghost(server, browser):
    first = begin(server, browser, 23)
    first.see("#progress .running", "Calibrating")
    telephone = begin(server, browser, 24, viewport={"width": 390, "height": 844}, color_scheme="dark")
    telephone.see("#progress .queued", "1 job before yours, about")
    third = begin(server, browser, 25, "kmeans")
    third.see("#progress .queued", "2 jobs before yours, about")
    telephone.shoot("8-queued-telephone-night", "#run")
    third.shoot("8-queued", "#run")
    telephone.arrive()
    telephone.see("#progress .queued", "1 job before yours")
    third.page.close()
    fourth = begin(server, browser, 27, "kmeans", viewport={"width": 390, "height": 844})
    fourth.see("#progress .queued", "3 jobs before yours, about")
    fourth.context.set_offline(True)
    telephone.press("#stop")
    telephone.see("#progress .trouble.calm", "You stopped it before its turn came")
    first.press("#stop")
    first.see("#progress .trouble.calm", "You stopped it")
    wait_for(project_of(server, 27), "done")
    fourth.context.set_offline(False)
    fourth.see("#progress .done", "tiny-2bit · kmeans · seed 27 is packed")
    third.reopen().arrive()
    third.see("#progress .done", "tiny-2bit · kmeans · seed 25 is packed")
    assert project_of(server, 24).status().phase == "paused" and project_of(server, 24).events() == []
    assert first.errors == telephone.errors == []


def test_a_telephone_that_loses_its_connection_finds_the_job_done(server, browser):
    visitor = begin(server, browser, 26, viewport={"width": 390, "height": 844})
    visitor.see("#progress .running", "Calibrating")
    visitor.context.set_offline(True)
    wait_for(project_of(server, 26), "done")
    visitor.context.set_offline(False)
    visitor.see("#progress .done", "tiny-2bit · paper · seed 26 is packed")
