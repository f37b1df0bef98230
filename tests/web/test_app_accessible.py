"""The page for everybody: by day and by night, on a telephone, read aloud, and without a mouse."""

from __future__ import annotations

import re

import pytest
from app_server import AppServer
from browsing import Visitor, complaints, needs_chromium, new_browser, new_root, small_targets  # noqa: F401  fixtures
from playwright.sync_api import expect

pytestmark = [needs_chromium, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root)) as found:
        yield found


LOOKS = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "small": {"viewport": {"width": 390, "height": 844}},
    "small-dark": {"color_scheme": "dark", "viewport": {"width": 390, "height": 844}},
}
BOXES = ("#advanced-box", "#layers-box", "#log-box", "#grid-box", "#blind-box", "#widths-box")


def test_by_day_by_night_and_on_a_telephone_it_fits_and_can_be_read_by_all(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=11")
    for bits in (2, 4):
        visitor.page.locator("#bits label").filter(has_text=f"{bits} bits").click()
        visitor.see("#command", f"--bits {bits}")
        visitor.press("#start")
        visitor.see("#progress .done", f"tiny-{bits}bit · kmeans · seed 11 is packed")
        visitor.press("#draw")
        visitor.see("#figures", "noise error")
    storage = visitor.context.storage_state()
    for name, look in LOOKS.items():
        guest = Visitor(browser, server.url, storage_state=storage, **look).arrive()
        guest.see("#figures", "noise error")
        for box in BOXES:
            guest.open(box)
        guest.press("#another")
        guest.see("#blind figcaption")
        expect(guest.page.locator("#widths img").first).to_be_visible()
        every_picture_says_what_it_shows(guest)
        assert guest.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name} is wider than its screen"
        guest.shoot(f"4-{name}")
        assert complaints(guest) == [], name
        guest.open("#jobs-box")
        assert small_targets(guest) == [], name
        guest.page.locator("#labels input").click()
        guest.see("[role=option]")
        assert small_targets(guest) == [], f"{name}, with a list open"
        guest.context.close()


# Where there are pictures, and what each one's words must name; the blind test's may not tell which one is the original.
PICTURES = {
    "#hero img": r"original.* 2 bits.* differences",
    "#slider-box .under": r", seed \d+, at 4 bits$",
    "#slider-box .over": r", seed \d+, original$",
    "#slider-box figure img": r"^Difference of the two",
    "#grid img": r", seed \d+, (original|4 bits)$",
    "#blind img": r"^(Left|Right) picture: (?!.*(original|bits))",
    "#widths img": r", seed \d+, (original|[24] bits)",
}


def every_picture_says_what_it_shows(visitor: Visitor) -> None:
    told = {place: [i.get_attribute("alt") or "" for i in visitor.page.locator(place).all()] for place in PICTURES}
    for place, alts in told.items():
        assert alts and all(re.search(PICTURES[place], alt) for alt in alts), (place, alts)
    assert sum(map(len, told.values())) == visitor.page.locator("img:not(footer img)").count(), "there is one elsewhere"


def test_the_whole_way_can_be_gone_by_keyboard(server, browser):
    visitor = Visitor(browser, server.url).arrive("?recipe=kmeans&seed=12&model=assets/emoji-dit")
    tab_to(visitor, "#model input")
    visitor.page.keyboard.type("tiny")
    expect(visitor.page.get_by_role("option").first).to_have_text(re.compile("folder:tiny"))
    visitor.page.keyboard.press("ArrowDown")
    visitor.page.keyboard.press("Enter")
    visitor.see("#card h3", "folder:tiny")
    for button, sign in (("start", "#progress .done"), ("draw", "#slider"), ("prepare", "#download")):
        tab_to(visitor, f"#{button}")
        visitor.page.keyboard.press("Enter")
        visitor.see(sign)
    visitor.see("#figures", "noise error")  # nothing is drawn any more
    tab_to(visitor, "#slider")
    visitor.page.keyboard.press("End")
    assert visitor.page.locator("#slider").input_value() == "100"


def tab_to(visitor: Visitor, element: str) -> None:
    """Press Tab until that element has the focus, from the top of the page."""
    visitor.page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    for _ in range(150):
        visitor.page.keyboard.press("Tab")
        if visitor.page.evaluate("selector => document.activeElement.matches(selector)", element):
            return
    raise AssertionError(f"Tab never comes to {element}")
