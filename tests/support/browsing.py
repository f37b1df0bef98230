"""What the browser tests share: Chromium that may not leave loopback, and the steps of the app by name."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from tiny import new_pipeline

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
PATIENCE = 800.0  # seconds; a machine may be busy with other things
SCREENSHOTS = Path(os.environ.get("VQ4DIT_SCREENSHOTS") or Path(tempfile.gettempdir()) / "vq4dit-screenshots")

expect.set_options(timeout=1000 * PATIENCE)
needs_chromium = pytest.mark.skipif(not CHROMIUM and not os.environ.get("CI"), reason="there is no chromium here")


@pytest.fixture(scope="module", name="browser")
def new_browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module", name="root")
def new_root(tmp_path_factory) -> Path:
    """A folder for `--root`, with one tiny model."""
    folder = tmp_path_factory.mktemp("root")
    new_pipeline().save_pretrained(folder / "tiny")
    return folder


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def stay_on_loopback(route: Route) -> None:
    if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
        route.continue_()
    else:
        route.abort()


class Events:
    """What a page asks of the server and is told in return."""

    QUIET_SECONDS = 2.0  # an answer leads to the next event sooner than this
    IDLE_SECONDS = 60.0  # Gradio may leave a stream open that carries nothing more; nothing waited for here takes as long

    def __init__(self, page: Page):
        self.page, self.last = page, time.monotonic()
        self.open: set[Request] = set()
        self.page.on("framenavigated", lambda frame: self.open.clear())  # the browser does not always tell how those ended
        self.page.on("request", lambda request: self.note(request, self.open.add))
        self.page.on("requestfinished", lambda request: self.note(request, self.open.discard))
        self.page.on("requestfailed", lambda request: self.note(request, self.open.discard))

    def note(self, request: Request, what: Callable[[Request], None]) -> None:
        if "/queue/" in request.url:
            what(request)
            self.last = time.monotonic()

    def wait_until_over(self) -> None:
        """Return when the page has asked nothing for a while, and has had its answers or will get none."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() - self.last < (self.IDLE_SECONDS if self.open else self.QUIET_SECONDS):
            assert time.monotonic() < end, [request.url for request in self.open]
            self.page.wait_for_timeout(100)


class Visitor:
    """One person's browser with its own storage, and what they do in the app."""

    def __init__(self, browser: Browser, url: str, **settings):
        self.context = browser.new_context(
            **({"viewport": {"width": 1280, "height": 900}, "accept_downloads": True} | settings)
        )
        self.context.route("**/*", stay_on_loopback)
        self.url, self.errors = url, list[str]()
        self.reopen()

    def reopen(self) -> Visitor:
        """A new tab of the same browser."""
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.events = Events(self.page)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        return self

    def arrive(self, query: str = "") -> Visitor:
        self.page.goto(self.url + query)
        expect(self.page.locator("#card .card, #card .trouble").first).to_be_visible()
        return self

    def see(self, selector: str, text: str | None = None) -> None:
        expect(self.page.locator(selector).first).to_be_visible()
        if text is not None:
            expect(self.page.locator(selector).first).to_contain_text(text)

    def press(self, selector: str) -> None:
        self.page.locator(selector).click()

    def open(self, selector: str) -> None:
        self.page.locator(f"{selector} > button").click()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def shoot(self, name: str, selector: str = "") -> None:
        """A screenshot to look at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        if selector:
            self.page.locator(selector).screenshot(path=SCREENSHOTS / f"{name}.png")
        else:
            self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    def choose_seeds(self, number: int) -> None:
        self.page.locator("#seeds label").nth(number - 1).click()
        self.see_seeds(number)

    def see_seeds(self, number: int) -> None:
        expect(self.page.locator("#seeds input").nth(number - 1)).to_be_checked()

    def download(self, folder: Path) -> Path:
        """Take the packed model home and unpack it."""
        self.press("#prepare")
        self.see("#download")
        with self.page.expect_download() as found:
            self.press("#download")
        path = folder / found.value.suggested_filename
        found.value.save_as(path)
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
        return folder / path.stem


def choose_from_search(visitor: Visitor, typed: str, name: str) -> None:
    """Type as a person does, look until the list shows what was meant, click."""
    box = visitor.page.locator("#model input")
    box.click()
    box.fill("")
    box.press_sequentially(typed, delay=150)
    found = visitor.page.get_by_role("option").first
    expect(found).to_contain_text(name)
    found.click()


SMALL = """() => {
    const all = [...document.querySelectorAll('a, button, input, textarea, summary, [role=button], [role=option]')];
    const target = e => e.matches('[type=radio], [type=checkbox]') && e.closest('label') || e;
    const is_small = box => box.width && box.height && Math.min(box.width, box.height) < 24;
    const found = all.filter(e => e.checkVisibility() && !e.matches('p a') && is_small(target(e).getBoundingClientRect()));
    return found.map(e => e.outerHTML.slice(0, 200));
}"""


def small_targets(visitor: Visitor) -> list[str]:
    """What is to be pressed and smaller than 24 px, which WCAG 2.2 asks of everything but links in a sentence (2.5.8)."""
    return visitor.page.evaluate(SMALL)


def complaints(visitor: Visitor) -> list[str]:
    """What axe finds serious or critical."""
    found = Axe().run(visitor.page).response["violations"]
    grave = [violation for violation in found if violation["impact"] in ("serious", "critical")]
    return [f"{violation['id']}: {node['html'][:200]}" for violation in grave for node in violation["nodes"]]
