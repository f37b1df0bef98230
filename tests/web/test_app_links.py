"""Links in a real browser: all that is chosen comes back to whoever follows one, and what cannot be is told in words."""

from __future__ import annotations

import re
import socket
import time
from urllib.parse import parse_qs

import pytest
import tiny_pipelines
from app_server import AppServer
from browsing import Visitor, choose_from_search, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from playwright.sync_api import expect

pytestmark = [needs_chromium, pytest.mark.slow]
SLOWER = 10  # than on a machine that does nothing else: a library of the Hub left alone tries for minutes


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    tiny_pipelines.build("flux").save_pretrained(root / "flux")
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root)) as found:
        yield found


def test_a_search_that_the_hub_does_not_answer_is_over_in_three_seconds_and_says_so(tmp_path, root, browser):
    with socket.socket() as silent:  # takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with AppServer(tmp_path / "jobs", "--root", str(root), HF_ENDPOINT=hub, HF_HUB_OFFLINE="0") as server:
            visitor = Visitor(browser, server.url).arrive("?model=folder:tiny")
            visitor.page.locator("#model input").fill("some model")
            begun = time.monotonic()
            visitor.page.locator("#model input").press("s")
            visitor.see("#model", "The Hub does not answer: only what is known here is listed.")
            print(f"told after {time.monotonic() - begun:.1f} s")
            assert time.monotonic() - begun < 3 * SLOWER
            assert visitor.errors == []


def link_with(visitor: Visitor, **wanted: str) -> str:
    """The link that the page shows, once it says what it shall."""
    for name, text in wanted.items():
        expect(visitor.page.locator("#link a")).to_have_attribute("href", re.compile(f"&{name}={re.escape(text)}(&|$)"))
    return visitor.page.locator("#link a").get_attribute("href")


def test_a_link_made_on_the_page_restores_it_for_somebody_else(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=paper&bits=3&seed=5&keep=*.ff.*")
    link_with(visitor, classes="0+1+2", keep="%2A.ff.%2A")
    visitor.page.locator("#labels .token").filter(has_text="dog").locator(".token-remove").click()
    visitor.choose_seeds(3)
    visitor.page.locator("#guidance input, #guidance textarea").fill("2.5")
    link = link_with(visitor, classes="0+2", seeds="3", guidance="2.5")

    other = Visitor(browser, server.url).arrive(link)
    other.see("#command", "--bits 3 --recipe paper --seed 5 --keep '*.ff.*'")
    expect(other.page.locator("#labels .token")).to_have_text([re.compile("cat"), re.compile("fox")])
    other.see_seeds(3)
    expect(other.page.locator("#guidance input, #guidance textarea")).to_have_value("2.5")
    expect(other.page.locator("#welcome")).to_be_hidden()
    assert link_with(other, classes="0+2", seeds="3", guidance="2.5") == link
    assert visitor.errors == other.errors == []


def test_a_link_restores_prompts_and_leaves_out_those_that_are_too_long_for_it(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:flux&recipe=kmeans&call=height%3D32")
    assert "prompts" not in parse_qs(link_with(visitor, call="height%3D32")), "nobody has changed them"
    prompts = visitor.page.locator("#prompts textarea")
    prompts.fill("a fox & a hen\n100 % of a cat")
    link = link_with(visitor, prompts="a+fox+%26+a+hen%0A100+%25+of+a+cat")
    other = Visitor(browser, server.url).arrive(link)
    expect(other.page.locator("#prompts textarea")).to_have_value("a fox & a hen\n100 % of a cat")

    prompts.fill("\n".join(f"{i} {'a very long prompt ' * 20}" for i in range(6)))
    visitor.see("#link-box .note", "it says all but them")
    assert "prompts" not in link_with(visitor, call="height%3D32") and len(link_with(visitor)) < 2000
    prompts.fill("a fox")
    link_with(visitor, prompts="a+fox")
    expect(visitor.page.locator("#link-box .note")).to_have_count(0)
    choose_from_search(visitor, "tiny", "folder:tiny")
    link_with(visitor, classes="0+1+2")
    assert "prompts" not in link_with(visitor)
    assert visitor.errors == other.errors == []


def test_nonsense_in_a_link_is_told_in_words(server, browser):
    query = "?model=folder:tiny&bits=7&components=foo&seeds=9&guidance=abc&classes=zebra&prompts=" + "%0A".join("abcdefghijklm")
    visitor = Visitor(browser, server.url).arrive(query)
    for told in ("bits=7", "components=foo", "seeds=9", "guidance=abc", "classes=zebra", "prompts=a b c"):
        visitor.see("#welcome", told)
    expect(visitor.page.locator("#labels .token")).to_have_count(3)
    visitor.see_seeds(1)
    other = Visitor(browser, server.url).arrive("?model=folder:tiny&classes=1+5000")
    other.see("#labels", "The link asks for classes that this model does not name: 5000.")
    expect(other.page.locator("#labels .token")).to_have_count(1)
    assert visitor.errors == other.errors == []


def test_some_seconds_after_whatever_it_asked_the_page_asks_for_nothing(server, browser):
    """So that an answer is told that was ready just as Gradio closed the stream of answers."""
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny")
    visitor.events.wait_until_over()
    with visitor.page.expect_request(lambda request: "/queue/join" in request.url and '"data":[]' in (request.post_data or "")):
        visitor.page.locator("#bits label").nth(1).click()
    visitor.events.wait_until_over()
    assert visitor.errors == []
