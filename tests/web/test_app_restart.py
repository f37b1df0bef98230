"""The server is killed and started again, on the same port and workspace, while pages of it are open."""

from __future__ import annotations

import pytest
from app_server import AppServer, made_by_the_command, weights
from browsing import Visitor, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from playwright.sync_api import expect

pytestmark = [needs_chromium, pytest.mark.slow]

CHOICE = "?model=folder:tiny&recipe=paper&seed=7"


@pytest.fixture
def server(tmp_path, root):
    with AppServer(tmp_path / "jobs", "--root", str(root)) as found:
        yield found


@pytest.fixture
def made(root):
    return made_by_the_command(str(root / "tiny"), "--recipe", "paper", "--seed", "7")


def start_a_job(visitor: Visitor) -> None:
    visitor.press("#start")
    visitor.see("#progress", "Calibrating")


def start_and_stop_a_job(visitor: Visitor) -> None:
    start_a_job(visitor)
    visitor.press("#stop")
    visitor.see("#progress .trouble", "You stopped it")


def test_a_page_reloaded_after_a_restart_goes_on_to_the_same_bytes(server, browser, tmp_path, made):
    visitor = Visitor(browser, server.url).arrive(CHOICE)
    start_a_job(visitor)
    server.kill()
    server.start()
    visitor.arrive()
    visitor.see("#progress .trouble", "The work was interrupted")
    visitor.press("#resume")
    visitor.see("#progress .done")
    assert weights(visitor.download(tmp_path)) == made


def test_a_page_that_watched_its_job_says_what_happened_by_itself(server, browser, tmp_path, made):
    """Nobody reloads here: the page says that the connection is lost, and comes back when the server does."""
    visitor = Visitor(browser, server.url).arrive(CHOICE)
    start_a_job(visitor)
    server.kill()
    visitor.see(".toast-body", "Connection to the server was lost. Attempting reconnection")
    server.start()
    visitor.see("#progress .trouble", "The work was interrupted: the server or its worker was stopped.")
    visitor.see("#progress .trouble", "Press Resume to go on; it ends in the same bytes.")
    visitor.press("#resume")
    visitor.see("#progress .done")
    assert weights(visitor.download(tmp_path)) == made


def test_a_page_that_only_stood_there_finds_its_job_again_by_itself(server, browser, tmp_path, made):
    """No stream broke, so Gradio tells the page nothing of the restart; all its buttons must do what they say all the same."""
    visitor = Visitor(browser, server.url).arrive(CHOICE)
    start_and_stop_a_job(visitor)
    restart_at_rest(server, visitor)
    visitor.see("#progress .trouble", "Press Resume to go on; it ends in the same bytes.")
    visitor.press("#resume")
    visitor.see("#progress .done")
    restart_at_rest(server, visitor)
    visitor.see("#progress .done", "is packed")
    expect(visitor.page.locator("#labels")).to_contain_text("cat")
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    assert weights(visitor.download(tmp_path)) == made
    assert visitor.errors == []


def test_a_press_while_the_server_is_away_leads_back_to_the_job(server, browser):
    visitor = Visitor(browser, server.url).arrive(CHOICE)
    start_and_stop_a_job(visitor)
    visitor.events.wait_until_over()
    server.kill()
    visitor.press("#resume")
    visitor.see(".toast-body", "Connection to the server was lost. Attempting reconnection")
    server.start()
    visitor.see("#welcome", "Your last job: tiny-2bit · paper · seed 7, paused")
    visitor.see("#progress .trouble", "You stopped it")
    visitor.press("#resume")
    visitor.see("#progress .done")


def restart_at_rest(server: AppServer, visitor: Visitor) -> None:
    """Kill and start the server while the page waits for nothing, and wait for the page that comes back."""
    visitor.events.wait_until_over()
    visitor.page.evaluate("window.isOld = true")
    server.kill()
    server.start()
    visitor.page.wait_for_function("!window.isOld && document.querySelector('#welcome')")
    visitor.events.wait_until_over()
