"""A model of prompts in a real browser: the whole way, films as strips of frames, and a model whose arguments are known."""

from __future__ import annotations

import shutil

import pytest
import tiny_pipelines
from app_server import AppServer
from browsing import Visitor, choose_from_search, complaints, needs_chromium, new_browser, new_root  # noqa: F401  fixtures
from playwright.sync_api import expect

pytestmark = [needs_chromium, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory, root):
    for name in ("flux", "wan"):
        tiny_pipelines.build(name).save_pretrained(root / name)
    with AppServer(tmp_path_factory.mktemp("app") / "jobs", "--root", str(root)) as found:
        yield found


def test_the_whole_way_with_prompts(server, browser):
    visitor = Visitor(browser, server.url).arrive("?model=folder:flux&recipe=kmeans&call=height%3D32%0Awidth%3D32%0Asize%3D1")
    visitor.see("#card .trouble", "FluxPipeline takes no argument 'size'")
    visitor.press("#start")
    visitor.see("#progress .trouble", "FluxPipeline takes no argument 'size'")
    visitor.open("#advanced-box")
    visitor.page.locator("#call textarea").fill("height=32\nwidth=32")
    visitor.see("#command", "--call height=32 --call width=32")
    prompts = visitor.page.locator("#prompts textarea")
    expect(prompts).to_have_value("a clock\na banana\na green frog on a leaf, macro")
    expect(visitor.page.locator("#labels")).not_to_be_visible()
    visitor.press("#start")
    visitor.see("#progress .done", "flux-2bit · kmeans · seed 0 is packed")

    prompts.fill("  ")
    visitor.press("#draw")
    visitor.see("#drawn .trouble", "Write one a line.")
    prompts.fill("a fox\na portrait of a young woman with freckles, studio light, shallow depth of field")
    expect(visitor.page.locator("#guidance input, #guidance textarea")).to_have_value("")
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    assert visitor.page.locator(".compare .over").get_attribute("alt") == "a fox, seed 0, original"
    visitor.page.locator("#pair label").nth(1).click()
    expect(visitor.page.locator(".compare .over")).to_have_attribute(
        "alt", "a portrait of a young woman with freckles, studio light, shallow depth of field, seed 0, original"
    )
    small = Visitor(
        browser, server.url, storage_state=visitor.context.storage_state(), viewport={"width": 390, "height": 844}
    ).arrive()
    small.see("#figures", "noise error")
    small.see("#prompts")
    small.open("#grid-box")
    assert small.page.evaluate("document.documentElement.scrollWidth <= innerWidth") and complaints(small) == []
    small.shoot("6-prompts-small")
    assert visitor.errors == small.errors == []


def test_a_job_of_classes_then_one_of_prompts_then_classes_again_and_back(server, browser):
    """Whatever is shown belongs to the job that is named, fields and figures too."""
    visitor = Visitor(browser, server.url, viewport={"width": 390, "height": 844}).arrive("?model=folder:tiny&recipe=kmeans")

    def make(title: str) -> dict[str, str]:
        visitor.press("#start")
        visitor.see("#progress .done", f"{title} is packed")
        visitor.see("#drawn", f"{title} is packed. Press Draw pairs")
        expect(visitor.page.locator("#slider-box img")).to_have_count(0)
        visitor.press("#draw")
        visitor.see("#figures", "noise error")
        return shown()

    def shown() -> dict[str, str]:
        images = visitor.page.locator("#slider-box img")
        return {name: images.first.get_attribute(name) for name in ("alt", "src")} | {"figures": visitor.text("#figures")}

    of_classes = make("tiny-2bit · kmeans · seed 0")
    expect(visitor.page.locator("#prompts")).to_be_hidden()
    choose_from_search(visitor, "folder:flux", "folder:flux")
    visitor.see("#card h3", "folder:flux")
    visitor.open("#advanced-box")
    visitor.page.locator("#call textarea").fill("height=32\nwidth=32")
    visitor.see("#command", "--call height=32 --call width=32")
    of_prompts = make("flux-2bit · kmeans · seed 0")
    visitor.see("#prompts")
    expect(visitor.page.locator("#labels")).to_be_hidden()
    visitor.page.locator("#call textarea").fill("")
    choose_from_search(visitor, "tiny", "folder:tiny")
    visitor.page.locator("#bits label").nth(1).click()
    visitor.see("#command", "ROOT/tiny --bits 3 --recipe kmeans --seed 0 --output")
    again = make("tiny-3bit · kmeans · seed 0")
    assert (of_classes["alt"], again["alt"]) == ("cat, seed 0, at 2 bits", "cat, seed 0, at 3 bits")
    visitor.open("#jobs-box")
    for line, title, found in ((2, "tiny-2bit", of_classes), (1, "flux-2bit", of_prompts)):
        visitor.page.locator("#jobs label").nth(line).click()
        visitor.press("#jobs-show")
        visitor.see("#progress .done", f"{title} · kmeans · seed 0 is packed")
        visitor.see("#drawn", f"{title} · kmeans · seed 0: 3 pairs")
        expect(visitor.page.locator("#slider-box img").first).to_have_attribute("src", found["src"])
        assert shown() == found
        expect(visitor.page.locator("#prompts")).to_be_visible(visible=title == "flux-2bit")
        expect(visitor.page.locator("#labels")).to_be_visible(visible=title == "tiny-2bit")
    assert visitor.errors == []


def test_a_film_is_a_strip_of_frames(server, browser):
    query = "?model=folder:wan&recipe=kmeans&call=height%3D32%0Awidth%3D32%0Anum_frames%3D5"
    visitor = Visitor(browser, server.url).arrive(query)
    visitor.press("#start")
    visitor.see("#progress .done", "wan-2bit · kmeans · seed 0 is packed")
    visitor.page.locator("#prompts textarea").fill("a fox")
    visitor.press("#draw")
    visitor.see("#figures", "noise error")
    visitor.open("#grid-box")
    box = visitor.page.locator(".compare").bounding_box()
    assert box["width"] / box["height"] > 4, "five frames side by side"
    assert visitor.page.locator(".pair.strip").count() == visitor.page.locator(".grid.strip").count() == 1
    visitor.shoot("6-film", "#compare")
    visitor.page.set_viewport_size({"width": 390, "height": 844})
    assert visitor.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    visitor.shoot("6-film-small", "#compare")


def test_a_model_that_the_recipe_cannot_do_says_which_one_can(server, browser, root):
    folder = root / "of-a-picture"
    shutil.copytree(root / "wan", folder)
    path = folder / "model_index.json"
    path.write_text(path.read_text().replace("WanPipeline", "WanImageToVideoPipeline"))
    visitor = Visitor(browser, server.url).arrive("?model=folder:of-a-picture")
    visitor.press("#start")
    for place in ("#card", "#progress"):
        visitor.see(f"{place} .trouble", "This cannot be done")
        visitor.see(f"{place} .trouble", "WanImageToVideoPipeline needs image.")
        visitor.see(f"{place} .trouble", "What to do: Choose the recipe kmeans, which needs no samples.")
        assert "--" not in visitor.text(place) and str(root) not in visitor.text(place)
    visitor.page.locator("#recipe label").filter(has_text="kmeans").click()
    visitor.see("#card h3", "folder:of-a-picture")
    visitor.see("#command", "--recipe kmeans")
    for field in ("#labels", "#prompts", "#guidance"):
        expect(visitor.page.locator(field)).not_to_be_visible()
    assert visitor.errors == []


def test_the_fields_follow_the_model_that_is_picked(server, browser):
    visitor = Visitor(browser, server.url).arrive()
    visitor.see("#labels")
    expect(visitor.page.locator("#prompts")).not_to_be_visible()
    choose_from_search(visitor, "emoji-flux", "bundled, text to image")
    visitor.see("#card h3", "assets/emoji-flux")
    visitor.see("#command", "--call height=64 --call max_sequence_length=12 --call 'negative_prompt=\"\"'")
    visitor.see("#prompts")
    expect(visitor.page.locator("#labels")).not_to_be_visible()
    choose_from_search(visitor, "tiny", "folder:tiny")
    visitor.see("#card h3", "folder:tiny")
    expect(visitor.page.locator("#command")).not_to_contain_text("--call")
    visitor.see("#labels")
    expect(visitor.page.locator("#prompts")).not_to_be_visible()
    assert visitor.errors == []
