"""Job after job in a real browser: what stands on the page belongs to the job that it names, and no job is lost."""

from __future__ import annotations

import re

import pytest
from app_server import AppServer
from browsing import Visitor, complaints, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from playwright.sync_api import expect

pytestmark = [needs_chromium, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root)) as found:
        yield found


def title(bits: int) -> str:
    return f"tiny-{bits}bit · kmeans · seed 0"


def quantize(visitor: Visitor, bits: int) -> None:
    visitor.page.locator("#bits label").nth(bits - 2).click()
    visitor.see("#command", f"--bits {bits}")
    visitor.press("#start")
    visitor.see("#progress .done", f"{title(bits)} is packed")


def draw(visitor: Visitor, bits: int) -> dict[str, str]:
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    visitor.see("#slider-box .tag.right", f"{bits} bits")
    return shown(visitor)


def shown(visitor: Visitor) -> dict[str, str]:
    """Figures and pictures."""
    images = visitor.page.locator("#slider-box img")
    return {"figures": visitor.text("#figures"), **{str(i): images.nth(i).get_attribute("src") for i in range(images.count())}}


def nothing_is_drawn_of(visitor: Visitor, bits: int) -> None:
    visitor.see("#drawn", f"{title(bits)} is packed. Press Draw pairs")
    expect(visitor.page.locator("#slider-box img")).to_have_count(0)
    expect(visitor.page.locator("#figures dd")).to_have_count(0)
    expect(visitor.page.locator("#pair")).to_be_hidden()
    expect(visitor.page.locator("#download")).to_be_hidden()


def test_job_after_job_and_back_to_the_first(server, browser, tmp_path):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans")
    visitor.see("#jobs-box", "All your jobs")
    quantize(visitor, 2)
    of_two = draw(visitor, 2)
    visitor.open("#blind-box")
    visitor.press("#another")
    visitor.see("#blind figcaption", "Left")
    taken = visitor.download(tmp_path)
    assert taken.name == "tiny-2bit-kmeans-seed0"

    quantize(visitor, 3)
    nothing_is_drawn_of(visitor, 3)
    visitor.see("#blind", "Draw some pairs first.")
    visitor.press("#guess-left")  # of the test that was begun with the other job
    visitor.see("#blind", "Draw some pairs first.")
    of_three = draw(visitor, 3)
    visitor.see("#blind", "Press Next pair")
    assert of_three != of_two

    quantize(visitor, 2)  # made already
    visitor.see("#progress", "It was made before, with these settings")
    visitor.see("#drawn", f"{title(2)}: 3 pairs")
    visitor.see("#slider-box .tag.right", "2 bits")
    assert shown(visitor) == of_two

    visitor.open("#jobs-box")
    expect(visitor.page.locator("#jobs label")).to_have_text(
        [re.compile(f"folder:tiny · {bits} bits · kmeans · seed 0") for bits in (2, 3)]
    )
    visitor.page.locator("#jobs label").nth(1).click()
    visitor.press("#jobs-show")
    visitor.see("#progress .done", title(3))
    visitor.see("#command", "--bits 3")
    visitor.see("#slider-box .tag.right", "3 bits")
    assert shown(visitor) == of_three
    visitor.shoot("6-jobs", "#run")
    assert complaints(visitor) == []
    visitor.arrive()  # a reload shows the job used last
    visitor.see("#welcome", "Your last job: tiny-")
    assert visitor.errors == []


def test_a_job_is_deleted_when_its_visitor_says_so_twice(server, browser):
    visitor = Visitor(browser, server.url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    visitor.arrive("?model=folder:tiny&recipe=kmeans")
    quantize(visitor, 4)
    quantize(visitor, 2)
    draw(visitor, 2)
    visitor.open("#jobs-box")
    expect(visitor.page.locator("#jobs label")).to_have_count(2)
    asked: list[str] = []
    visitor.page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    visitor.press("#jobs-delete")
    visitor.page.wait_for_timeout(1000)
    expect(visitor.page.locator("#jobs label")).to_have_count(2)
    assert "folder:tiny · 2 bits" in asked[0], "it says which"
    visitor.shoot("6-jobs-telephone-night", "#run")
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than its screen"
    for left, told in ((4, f"{title(4)} is packed"), (None, "Nothing runs yet.")):
        visitor.page.once("dialog", lambda dialog: dialog.accept())
        visitor.press("#jobs-delete")
        visitor.see("#progress", told)
        if left:
            nothing_is_drawn_of(visitor, left)
    visitor.see("#jobs-box", "Each model you quantize is listed here")
    visitor.see("#drawn", "When a model is packed, its pictures appear here")
    assert visitor.page.locator(".toast-body").count() == 0
    visitor.arrive()
    assert not visitor.page.locator("#welcome").is_visible()
    assert visitor.errors == []


def test_while_this_page_is_at_work_no_other_job_comes_onto_it(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans")
    quantize(visitor, 2)
    visitor.page.locator("#recipe label").nth(1).click()
    visitor.see("#command", "--recipe paper")
    visitor.press("#start")
    visitor.see("#progress .running", "tiny-2bit · paper · seed 0")
    visitor.open("#jobs-box")
    jobs = visitor.page.locator("#jobs label")
    expect(jobs).to_have_count(2)
    expect(jobs.nth(0).locator("input")).to_be_checked()
    visitor.page.once("dialog", lambda dialog: dialog.accept())
    visitor.press("#jobs-delete")
    visitor.see("#jobs-trouble", "is at work")
    jobs.nth(1).click()
    visitor.press("#jobs-show")
    visitor.see("#jobs-trouble", "is at work")
    visitor.see("#progress .running", "tiny-2bit · paper · seed 0")
    visitor.press("#stop")
    visitor.see("#progress .trouble.calm", "You stopped it")
    expect(jobs.nth(1).locator("input")).to_be_checked()  # as it was chosen
    visitor.press("#jobs-show")
    visitor.see("#progress .done", title(2))
    expect(visitor.page.locator("#jobs-trouble .trouble")).to_have_count(0)
    expect(visitor.page.locator("#resume")).to_be_hidden()
    assert visitor.page.locator(".toast-body").count() == 0 and visitor.errors == []


def test_nonsense_is_told_in_words(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&bits=7&seed=3.7&recipe=kmeans")
    visitor.see("#welcome", "bits=7 is not understood: bits are 2, 3, 4.")
    visitor.see("#welcome", "seed=3.7 is not understood")
    visitor.see("#command", "--bits 2 --recipe kmeans --seed 0")
    field = visitor.page.locator("#seed input")
    for number in ("-1", "2.5", "9007199254740993"):
        field.fill(number)
        field.blur()
        visitor.see("#card .trouble", "Seed must be a whole number from 0 to 2^53 - 1")
        visitor.press("#start")
        visitor.see("#progress .trouble", "Seed must be a whole number")
    field.fill("9007199254740991")
    field.blur()
    visitor.see("#command", "--seed 9007199254740991")
    assert visitor.page.locator(".toast-body").count() == 0 and visitor.errors == []
