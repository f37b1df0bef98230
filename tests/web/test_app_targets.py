"""Where a push may go, what the form keeps over a login, and a push that is cut by closing the page; in a real browser."""

from __future__ import annotations

import hashlib

import pytest
from browsing import PATIENCE, Visitor, complaints, needs_chromium, new_browser, small_targets  # noqa: F401  fixtures
from playwright.sync_api import expect
from space import name_of, new_hub, new_place, new_server, set_name, sign_in, sign_out, token_of, traces_of  # noqa: F401  fixtures

pytestmark = [needs_chromium, pytest.mark.slow]

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def make(visitor: Visitor) -> None:
    visitor.press("#start")
    visitor.see("#progress .done", "is packed")


def draw(visitor: Visitor) -> None:
    expect(visitor.page.locator("#figures")).not_to_contain_text("noise error")  # of the job before
    visitor.press("#draw")
    visitor.see("#figures", "noise error")


def choose(visitor: Visitor, box: str, option: str) -> None:
    """An option of a list."""
    visitor.page.locator(f"{box} input").click()
    visitor.page.get_by_role("option", name=option, exact=True).click()


def existing(visitor: Visitor, number: int) -> None:
    """Refuse, pull request, commit."""
    visitor.page.locator("#push-existing label").nth(number).click()


def made(place, number: int = 1) -> bytes:
    """Weights of the newest of `number` results."""
    files = sorted(place.glob(f"jobs/*/*/result/tiny-2bit/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    assert len(files) == number
    return files[-1].read_bytes()


def test_an_organisation_then_a_second_commit_with_plain_k_means_beside_it(server, place, browser, hub):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=3")
    sign_in(visitor)
    make(visitor)
    draw(visitor)
    visitor.see("#push-form")
    choose(visitor, "#push-owner", "acme")
    visitor.press("#push")
    visitor.see("#pushed .done", "acme/tiny-vq4dit-2bit")
    repo = hub.repos["acme/tiny-vq4dit-2bit"]
    assert list(hub.repos) == ["acme/tiny-vq4dit-2bit"] and len(repo.commits) == 2
    assert repo.head[WEIGHTS] == made(place)

    visitor.page.locator("#recipe label").nth(1).click()
    visitor.see("#command", "--recipe paper")
    visitor.press("#start")
    visitor.see("#progress", "Calibrating")
    visitor.see("#progress .done", "is packed")
    draw(visitor)
    choose(visitor, "#push-owner", "acme")
    visitor.press("#push")
    visitor.see("#pushed .trouble", "This repository exists already")
    existing(visitor, 2)
    visitor.press("#push")
    visitor.see("#pushed .done", "acme/tiny-vq4dit-2bit")
    assert len(repo.commits) == 3 and repo.head[WEIGHTS] == made(place, 2) and not repo.pull_requests
    card = repo.head["README.md"].decode()
    (this,) = [line for line in card.splitlines() if line.startswith("| **this model**, 2 bits, recipe `paper`")]
    (kmeans,) = [line for line in card.splitlines() if line.startswith("| plain k-means, same bits")]
    assert "not measured" not in this + kmeans and this.split("|")[2] == kmeans.split("|")[2]
    assert visitor.errors == []


def test_what_was_chosen_survives_the_way_to_the_login_and_back(server, place, browser, hub):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=4")
    visitor.page.locator("#bits label").nth(2).click()
    visitor.page.locator("#seed input").fill("5")
    visitor.open("#advanced-box")
    visitor.page.locator("#keep textarea, #keep input").fill("*.ff.* *.1.*")
    expect(visitor.page.locator("#labels .token")).to_have_count(3)
    visitor.page.locator("#labels input").click()
    visitor.page.keyboard.press("Backspace")
    expect(visitor.page.locator("#labels .token")).to_have_count(2)
    visitor.page.keyboard.press("Escape")
    visitor.choose_seeds(2)
    visitor.page.locator("#guidance input, #guidance textarea").fill("2.5")
    sign_in(visitor)
    visitor.see("#command", "--bits 4 --recipe kmeans --seed 5 --keep '*.ff.*' --keep '*.1.*'")
    expect(visitor.page.locator("#labels .token")).to_have_count(2)
    visitor.see_seeds(2)
    expect(visitor.page.locator("#guidance input, #guidance textarea")).to_have_value("2.5")

    make(visitor)
    visitor.see("#push-form")
    choose(visitor, "#push-owner", "acme")
    set_name(visitor, "my-own-name")
    visitor.page.locator("#push-private input").uncheck()
    existing(visitor, 1)
    hub.users[token_of(hub)].expires_at = 0
    visitor.press("#push")
    visitor.see("#pushed .trouble", "You are not signed in")
    sign_out(visitor)
    sign_in(visitor)
    visitor.see("#push-form")
    assert (visitor.page.locator("#push-owner input").input_value(), name_of(visitor)) == ("acme", "my-own-name")
    assert visitor.page.locator("#push-private input").is_checked(), "a link makes nothing public"
    expect(visitor.page.locator("#push-existing input").nth(1)).to_be_checked()
    visitor.see("#command", "--bits 4 --recipe kmeans --seed 5")
    existing(visitor, 0)
    visitor.press("#push")
    visitor.see("#pushed .done", "acme/my-own-name")
    assert visitor.errors == []


def test_who_turns_back_on_the_way_to_the_login_finds_their_choice(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&bits=3&seed=8")
    sign_in(visitor)
    visitor.page.go_back()
    for _ in range(2):
        visitor.see("#command", "--bits 3 --recipe kmeans --seed 8")
        visitor.page.reload()
    expect(visitor.page.locator("#login")).to_have_text("Sign out (ann)")  # the login stands; only the address is older
    visitor.see("#command", "--bits 3 --recipe kmeans --seed 8")
    sign_out(visitor)
    visitor.see("#command", "--bits 3 --recipe kmeans --seed 8")


@pytest.mark.parametrize("look", ["day", "night"])
def test_the_form_of_somebody_signed_in_fits_a_telephone_and_can_be_read_by_all(server, browser, look):
    night = {"color_scheme": "dark"} if look == "night" else {}
    visitor = Visitor(browser, server.url, viewport={"width": 390, "height": 844}, **night)
    visitor.arrive("?model=folder:tiny&recipe=kmeans&seed=6")
    sign_in(visitor)
    make(visitor)
    visitor.see("#push-form")
    for moment in ("before", "trouble", "done"):
        if moment != "before":
            set_name(visitor, "a b" if moment == "trouble" else f"of-{look}")
            visitor.press("#push")
            visitor.see(f"#pushed .{moment}")
        assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than its screen"
        assert complaints(visitor) == [] and small_targets(visitor) == [], moment
        visitor.shoot(f"5-telephone-{look}-{moment}", "#keep-it")


def test_a_push_cut_by_closing_the_page_goes_on_to_one_complete_repository(server, place, browser, hub):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=7")
    sign_in(visitor)
    make(visitor)
    set_name(visitor, "cut")
    hub.lfs.clear()
    requests = len(hub.requests)
    fault = hub.fail("PUT /lfs/", slow=3, times=9)
    visitor.press("#push")
    visitor.see("#pushed .running", "kB of")
    visitor.page.close()
    commits = [request for request in hub.requests[requests:] if "POST" in request and "/commit/" in request]
    assert commits == [] and set(hub.repos["ann/cut"].head) == {".gitattributes"}

    again = visitor.context.new_page()
    visitor.page = again
    again.set_default_timeout(1000 * PATIENCE)
    visitor.arrive("?model=folder:tiny&recipe=kmeans&seed=7")
    visitor.see("#push-form")
    fault.times, fault.slow = 0, 0.0
    again.wait_for_timeout(5000)  # enough for what the first push has left to send
    assert set(hub.repos["ann/cut"].head) == {".gitattributes"}, "the first push went on without its page"
    set_name(visitor, "cut")
    visitor.press("#push")
    visitor.see("#pushed .done", "ann/cut")
    repo = hub.repos["ann/cut"]
    local = {hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob(f"jobs/*/*/result/tiny-2bit/{WEIGHTS}")}
    assert len(repo.commits) == 2 and hashlib.sha256(repo.head[WEIGHTS]).hexdigest() in local
    assert sum(name.startswith("ann/cut") for name in hub.repos) == 1 and not repo.pull_requests
    for token in hub.users:
        assert traces_of(token, place) == []
