"""The app in a real browser: the whole way, two visitors at once, reloads, searches, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from app_server import HOME, AppServer, made_by_the_command, weights
from browsing import Visitor, choose_from_search, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from hub_environment import PORT
from hub_server import Hub
from playwright.sync_api import Route, expect

pytestmark = [needs_chromium, pytest.mark.slow]

BUNDLED = "assets/emoji-dit"


@pytest.fixture(scope="module")
def hub(root):
    """A Hub with one good model and one that must be refused."""
    with Hub(PORT) as found:
        files = {str(p.relative_to(root / "tiny")): p.read_bytes() for p in (root / "tiny").rglob("*") if p.is_file()}
        found.add_repo("ann/tiny-dit", files, card={"license": "mit"})
        index = json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
        found.add_repo("ann/tiny-unet", {"model_index.json": index.encode()})
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory, root, hub):
    settings = {"VQ4DIT_SLICE_SECONDS": "20", "HF_HUB_OFFLINE": "0"}
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root), **settings) as found:
        yield found


def test_the_whole_way_with_a_stop_and_a_reload(server, browser, tmp_path):
    visitor = Visitor(browser, server.url).arrive()
    visitor.see("#card", "56 layers are quantized")
    visitor.shoot("1-first-screen")
    visitor.page.locator("#recipe label").nth(2).click()
    expect(visitor.page.locator("#recipe input").nth(2)).to_be_checked()
    visitor.see("#card tr.chosen", "3.61 MB")
    visitor.see("#command", "python -m vq4dit quantize assets/emoji-dit --bits 2 --recipe kmeans --seed 0")

    visitor.press("#start")
    visitor.see("#chart rect")
    visitor.see("#progress", "left")
    visitor.press("#stop")  # at once: the job takes some seconds only
    visitor.see("#progress .trouble", "You stopped it")
    visitor.shoot("2-stopped")
    done = int(visitor.text("#progress").split("codebooks: ")[1].split(" ")[0])
    assert 0 < done < 56

    visitor.arrive()
    visitor.see("#welcome", "Your last job: emoji-dit-2bit · kmeans · seed 0, paused")
    visitor.see("#progress", f"{done} of 56")
    visitor.press("#resume")
    visitor.see("#progress .done", "is packed")
    expect(visitor.page.locator("#welcome")).to_be_hidden()  # it said "paused"

    visitor.press("#draw")
    visitor.see("#slider-box .compare")
    visitor.see("#figures", "noise error")
    compare_with_mouse_and_keyboard(visitor)
    play_blind(visitor)
    visitor.open("#grid-box")
    visitor.see("#grid img")
    visitor.shoot("3-done")

    taken = visitor.download(tmp_path)
    assert weights(taken) == made_by_the_command(BUNDLED, "--bits", "2", "--recipe", "kmeans")
    assert (taken / "report" / "report.json").exists() and list((taken / "report").glob("*-difference.png"))
    code = (
        f"import vq4dit; from diffusers import DiTPipeline; p = DiTPipeline.from_pretrained({str(taken)!r}); "
        "print(p([5], num_inference_steps=2).images[0].size)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=HOME, env=server.environment, check=True, capture_output=True, text=True
    )
    assert "(64, 64)" in loaded.stdout
    assert visitor.errors == []


def compare_with_mouse_and_keyboard(visitor: Visitor) -> None:
    slider = visitor.page.locator("#slider")
    box = slider.bounding_box()
    visitor.page.mouse.click(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2)
    assert abs(int(slider.input_value()) - 80) <= 3
    assert visitor.page.locator(".compare").evaluate("e => e.style.getPropertyValue('--at')") == f"{slider.input_value()}%"
    before = int(slider.input_value())
    slider.focus()
    visitor.page.keyboard.press("ArrowLeft")
    assert int(slider.input_value()) == before - 1
    assert visitor.page.locator(".compare img").count() == 2
    first = visitor.page.locator(".compare .over").get_attribute("alt")
    visitor.page.locator("#pair label").nth(1).click()
    expect(visitor.page.locator(".compare .over")).not_to_have_attribute("alt", first)
    visitor.see("#slider-box figure", "PSNR")


def play_blind(visitor: Visitor) -> None:
    visitor.open("#blind-box")
    visitor.press("#another")
    visitor.see("#blind figcaption", "Left")
    visitor.press("#guess-left")
    visitor.see("#score", "of 1 right")
    visitor.press("#another")
    visitor.see("#blind figcaption", "Left")  # after a guess the names stand there
    visitor.press("#guess-right")
    visitor.see("#score", "of 2 right")


# The stated position may be seen for a moment only.
WATCH_POSITION = """() => {
    const shown = () => document.querySelector("#progress").textContent;
    const look = () => { window.hadPosition ||= shown().includes("1 job before yours"); };
    new MutationObserver(look).observe(document.body, { childList: true, characterData: true, subtree: true });
}"""


def test_two_visitors_at_once_take_turns_and_see_only_their_own(server, browser):
    ann = Visitor(browser, server.url).arrive("?model=assets/emoji-dit&recipe=paper&seed=1")
    bob = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=2")
    ann.press("#start")
    ann.see("#chart rect")
    bob.page.evaluate(WATCH_POSITION)
    bob.press("#start")
    bob.see("#progress .done")  # when ann's turn is over, long before her job is
    assert bob.page.evaluate("window.hadPosition"), "bob was not told his place in the queue"
    ann.see("#progress .running")
    ann.press("#stop")
    ann.see("#progress .trouble", "You stopped it")
    bob.arrive()
    bob.see("#welcome", "tiny-2bit · kmeans · seed 2, done")
    bob.see("#command", "--seed 2")
    ann.arrive()
    ann.see("#welcome", "emoji-dit-2bit · paper · seed 1, paused")
    carl = Visitor(browser, server.url).arrive()
    assert not carl.page.locator("#welcome").is_visible()
    assert "Nothing runs yet" in carl.text("#progress")


def test_a_link_restores_settings(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=paper&bits=3&seed=5&keep=*.ff.*")
    visitor.see("#command", "--bits 3 --recipe paper --seed 5 --keep '*.ff.*'")
    visitor.see("#card tr.chosen", "3 bits")


def test_nothing_starts_before_the_settings_of_the_link_have_arrived(server, browser):
    """Else an early click quantizes what the page shows at first."""
    visitor = Visitor(browser, server.url)
    held: list[Route] = []
    visitor.page.route("**/queue/join*", lambda route: held.append(route), times=1)
    visitor.page.goto(server.url + "?model=folder:tiny&recipe=kmeans&seed=14")
    start = visitor.page.locator("#start")
    expect(start).to_be_disabled()
    while not held:
        visitor.page.wait_for_timeout(100)
    expect(start).to_be_disabled()
    held[0].continue_()
    expect(start).to_be_enabled()
    expect(visitor.page.locator("#command")).to_contain_text("ROOT/tiny")


def test_a_model_is_found_on_the_hub_and_quantized_and_a_wrong_one_is_refused(server, browser, hub):
    visitor = Visitor(browser, server.url).arrive()
    visitor.page.locator("#recipe label").nth(2).click()
    choose_from_search(visitor, "tiny-unet", "ann/tiny-unet")
    visitor.see("#card .trouble", "This model cannot be quantized")
    visitor.see("#card .trouble", "ann/tiny-unet is a StableDiffusionPipeline with a UNet")
    choose_from_search(visitor, "tiny-dit", "ann/tiny-dit")
    visitor.see("#card h3", "ann/tiny-dit")
    visitor.see("#card dl", "mit")
    visitor.page.locator("#model input").fill("folder:tiny")
    visitor.page.locator("#model input").press("Enter")
    visitor.see("#card h3", "folder:tiny")
    visitor.page.locator("#model input").fill("https://huggingface.co/ann/tiny-dit/tree/main")  # pasted
    visitor.page.locator("#model input").press("Enter")
    visitor.see("#card h3", "ann/tiny-dit")
    visitor.see("#command", "quantize ann/tiny-dit --bits 2")
    visitor.press("#start")
    visitor.see("#progress .done", "tiny-dit-2bit · ")


def test_the_choices_are_those_of_the_whole_word_however_fast_it_is_typed(server, browser, hub, monkeypatch):
    """The Hub is slow to answer the beginning of the word; that answer must not be the last one shown."""
    answer = hub.fault_of

    def slow_at_first(request):
        time.sleep(1.5 if re.search(r"search=(tin?)(&|$)", request) else 0)
        return answer(request)

    monkeypatch.setattr(hub, "fault_of", slow_at_first)
    visitor = Visitor(browser, server.url).arrive()
    for delay in (0, 40, 150):  # milliseconds between two keys: pasted, typed by a machine, typed by a person
        box = visitor.page.locator("#model input")
        box.click()  # selects what stands there
        expect(box).to_have_js_property("selectionStart", 0)
        box.press_sequentially("tiny-dit", delay=delay)
        expect(visitor.page.get_by_role("option").first).to_contain_text("ann/tiny-dit")
        time.sleep(2)  # longer than the slow answers
        expect(visitor.page.get_by_role("option").first).to_contain_text("ann/tiny-dit")
        assert visitor.page.get_by_role("option").count() > 7
        box.press("Tab")
    assert visitor.errors == []


def test_settings_changed_quickly_are_all_on_the_card(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:tiny&recipe=kmeans&seed=13")
    for bits, recipe in ((3, "paper"), (4, "best"), (2, "kmeans"), (3, "best")):
        visitor.page.locator("#bits label").filter(has_text=f"{bits} bits").click()
        visitor.page.locator("#recipe label").filter(has_text=recipe).click()
    visitor.see("#command", "--bits 3 --recipe best --seed 13")
    visitor.see("#card tr.chosen", "3 bits")


def test_a_refusal_is_words_on_the_page(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:../../etc")
    visitor.see("#card .trouble", "There is no pipeline folder '../../etc' below the root.")
    visitor.see("#card .trouble", "What to do: Pick one from the list.")
    visitor.press("#start")
    visitor.see("#progress .trouble", "This cannot be done")
    assert "Traceback" not in visitor.page.content()
