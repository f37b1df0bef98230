"""The page with models of prompts: fields that fit the model, arguments of the call checked before the work, words escaped."""

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import gradio as gr
import pytest
import tiny_pipelines
from starlette.requests import Request
from tiny import new_pipeline

from vq4dit.bundled import BUNDLED, BUNDLED_FLUX, CALLS
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.drawn_pairs import drawn_pairs
from vq4dit.projects.workspace import Workspace
from vq4dit.web import html, pictures
from vq4dit.web.answers import Answers
from vq4dit.web.choice import Choice
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.links import chosen, link_of, suggested
from vq4dit.web.studio import Studio

HOME = Path(__file__).parents[2]
SMALL = "height=32\nwidth=32\nmax_sequence_length=8"
NASTY = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    new_pipeline().save_pretrained(folder / "tiny")
    tiny_pipelines.build("flux").save_pretrained(folder / "flux")
    return folder


@pytest.fixture
def answers(root, tmp_path):
    return Answers(Studio(Catalog(HOME, root), Workspace(tmp_path / "jobs")))


@pytest.fixture
def compare(answers):
    return CompareAnswers(answers.studio)


@pytest.fixture
def visitor(answers):
    return answers.studio.workspace.visitor(None)


def visit(link: dict[str, str]) -> gr.Request:
    return gr.Request(Request({"type": "http", "headers": [], "query_string": urlencode(link).encode()}))


def fields(answers, model, visitor, project_key="", listed="", link=None) -> tuple:
    return answers.conditions(model, listed, visitor, project_key, visit(link or {}), None)


def packed(answers, visitor, model="folder:flux", call=SMALL) -> str:
    *_, key, turn = answers.begin(visitor, 0, None, model, 2, "kmeans", 0, "", call)
    list(answers.quantize(visitor, key, turn))
    assert answers.studio.project(visitor, key).status().phase == "done"
    return key


# --- what there is to fill in ---


def test_a_model_of_prompts_has_a_field_for_prompts_and_one_of_classes_a_list_of_them(answers, visitor):
    classes, prompts, guidance, listed = fields(answers, "folder:flux", visitor)
    assert (classes.visible, prompts.visible, guidance.visible, listed) == (False, True, True, "folder:flux")
    assert prompts.value.splitlines() == ["a clock", "a banana", "a green frog on a leaf, macro"]
    assert guidance.placeholder == "3.5 by default" and "value" not in guidance.constructor_args
    classes, prompts, guidance, _ = fields(answers, "folder:tiny", visitor)
    assert (classes.visible, prompts.visible, guidance.placeholder) == (True, False, "4 by default")
    assert classes.value == [0, 1, 2]


def test_what_is_drawn_is_of_the_jobs_model_whatever_is_picked_above(answers, visitor):
    *_, key, _ = answers.begin(visitor, 0, None, "folder:flux", 2, "kmeans", 0, "", "guidance_scale=2")
    _, prompts, guidance, listed = fields(answers, "folder:tiny", visitor, key)
    assert (prompts.visible, guidance.placeholder, listed) == (True, "2 by default", "folder:flux")
    again = fields(answers, "folder:tiny", visitor, key, "folder:flux")
    assert again[0] == again[1] == gr.skip() and again[2].placeholder == "2 by default", "what was written stays"


def test_a_link_restores_prompts_and_arguments(answers, visitor):
    choice = Choice("folder:flux", 2, "kmeans", 0, "", 'negative_prompt="a & b"\nheight=32')
    read = chosen(dict(parse_qsl(link_of(choice.model, choice.settings()).removeprefix("?"))), None)
    assert replace(choice, call=read[5]).settings() == choice.settings()
    _, prompts, _, _ = fields(answers, "folder:flux", visitor, link={"model": "folder:flux", "prompts": "a fox\na car"})
    assert prompts.value == "a fox\na car"
    _, prompts, _, _ = fields(answers, "folder:flux", visitor, link={"model": "another", "prompts": "a fox\na car"})
    assert prompts.value != "a fox\na car"


def test_a_link_says_what_to_draw_and_restores_it(answers, visitor):
    choice, examples = ("folder:flux", 2, "kmeans", 0, "", ""), "a clock\na banana\na green frog on a leaf, macro"

    def drawn_in_link(listed, *drawn):
        (href,) = re.findall('href="([^"]*)"', answers.link(listed, *drawn, *choice))
        return dict(parse_qsl(unescape(href).removeprefix("?")))

    made = drawn_in_link("folder:flux", None, " a fox & a hen \n\n100 %", 3, " 2.5 ")
    assert (made["prompts"], made["seeds"], made["guidance"]) == ("a fox & a hen\n100 %", "3", "2.5")
    classes, prompts, guidance, _ = fields(answers, "folder:flux", visitor, link=made)
    assert (classes.value, prompts.value, guidance.value) == (None, "a fox & a hen\n100 %", "2.5")
    assert drawn_in_link("folder:tiny", [1, 2], "", 1, "")["model"] == "folder:flux", "classes are of another model"
    for drawn in ((None, examples, 1, ""), (None, "a\n" * 2 + "x" * 501, 1, "high"), ([], "", 1, "")):
        assert not {"classes", "prompts", "seeds", "guidance"} & drawn_in_link("folder:flux", *drawn).keys(), drawn
    assert drawn_in_link("folder:flux", [0, 7], "", 1, "")["classes"] == "0 7"
    assert answers.link("", [], "", 1, "", "folder:flux", 2, "kmeans", -1, "", "") == "", "the card says what is wrong"


def test_prompts_that_make_a_link_too_long_stay_out_and_the_page_says_so(answers):
    long = "\n".join(f"{i} {'ü very long prompt ' * 20}" for i in range(6))
    shown = answers.link("folder:flux", None, long, 2, "", "folder:flux", 2, "kmeans", 0, "", "")
    assert "it says all but them" in shown and "prompts=" not in shown and "seeds=2" in shown
    assert "it says all" not in answers.link("folder:flux", None, "a fox", 2, "", "folder:flux", 2, "kmeans", 0, "", "")


def test_classes_of_a_link_that_the_model_does_not_have_are_told(answers, visitor):
    link = {"model": "folder:tiny", "classes": "1 5000"}
    classes, *_ = fields(answers, "folder:tiny", visitor, link=link)
    assert classes.value == [1] and classes.info == "The link asks for classes that this model does not name: 5000."
    classes, *_ = fields(answers, "folder:tiny", visitor, link=link | {"classes": "1 2"})
    assert classes.value == [1, 2] and classes.info == ""


def test_arguments_of_a_bundled_model_are_filled_in(answers):
    assert answers.suggest(BUNDLED) == answers.suggest("ann/x") == ""
    assert (
        Choice(BUNDLED_FLUX, 2, "best", 0, "", answers.suggest(BUNDLED_FLUX)).settings().call_arguments == CALLS[BUNDLED_FLUX]
    )
    assert chosen({"model": BUNDLED_FLUX}, None)[5] == suggested(BUNDLED_FLUX)


def test_the_command_says_the_arguments():
    settings = Choice("ann/x", 2, "best", 0, "", "negative_prompt=it's\nheight=64").settings()
    wanted = "--seed 0 --call height=64 --call 'negative_prompt=\"it'\\''s\"' --output out"
    assert html.command_of("ann/x", settings, "out").endswith(wanted)


# --- what is wrong is said before anything starts ---


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("height", "NAME=VALUE, one a line"),
        ("size=3", "FluxPipeline takes no argument &#x27;size&#x27;; it takes prompt,"),
        ("height=tall", "Height of FluxPipeline takes int, got &#x27;tall&#x27;"),
        ("prompt=x", "Call must leave prompt to vq4dit"),
        (f"{NASTY}=1", "got &#x27;&lt;img"),
    ],
)
def test_arguments_that_do_not_fit_are_told_before_anything_starts(answers, visitor, call, words):
    choice = ("folder:flux", 2, "best", 0, "", call)
    told = answers.look(None, *choice)[0], answers.begin(visitor, 0, None, *choice)[0]
    for shown in told:
        assert words in shown and "One of the settings does not fit" in shown and "<img" not in shown
    assert list(answers.studio.workspace.projects(visitor)) == []


def test_a_pipeline_that_needs_more_than_words_is_told_which_recipe_takes_it(answers, visitor, monkeypatch):
    card = replace(answers.studio.card("folder:flux"), pipeline="WanImageToVideoPipeline")
    monkeypatch.setattr(answers.studio, "card", lambda *_, **__: card)
    told = answers.look(None, "folder:flux", 2, "best", 0, "", "")[0]
    assert "needs image" in told and "Choose the recipe kmeans, which needs no samples." in told
    assert "This model cannot be quantized" not in told
    assert "trouble" not in answers.look(None, "folder:flux", 2, "kmeans", 0, "", "")[0]
    assert [field.visible for field in fields(answers, "folder:flux", visitor)[:3]] == [False] * 3


# --- drawing ---


def test_prompts_are_drawn_named_and_escaped(answers, visitor, compare):
    key, written = packed(answers, visitor), f"a fox\n{NASTY}\n{'a very long prompt ' * 10}"
    assert compare.begin_drawing(visitor, key, 0, [], 1, written, "2")[2] == 1
    *_, last = compare.draw(visitor, key, 1, [], 1, None, written, "2")
    pairs = drawn_pairs(answers.studio.project(visitor, key))
    assert [pair.name for pair in pairs] == [line.strip() for line in written.splitlines()]
    assert {pair.guidance_scale for pair in pairs} == {2.0} and "3 pairs" in last[0]
    chips = [shown for shown, _ in last[1].choices]
    assert chips[0] == "a fox · 0" and max(map(len, chips)) < 60
    project = answers.studio.project(visitor, key)
    shown = [last[4], *(pictures.slider(project, pair) + pictures.blind(project, pair, True, False) for pair in pairs)]
    assert all(not re.search(r"<img src=x|<img [^>]*onerror=\"", text) for text in shown)
    assert 'alt="a fox, seed 0, original"' in shown[1] and f'alt="{pairs[2].name}, seed 0, at 2 bits"' in shown[3]


def test_without_prompts_nothing_is_drawn_and_the_page_says_what_to_write(answers, visitor, compare):
    key = packed(answers, visitor)
    for written, guidance, words in ((" \n", "", "Write one a line."), ("a fox", "high", "Guidance must be a number")):
        told, _, drawing = compare.begin_drawing(visitor, key, 5, [1], 1, written, guidance)
        assert words in told and drawing == 5
        (only,) = compare.draw(visitor, key, 6, [1], 1, None, written, guidance)
        assert words in only[0] and not only[9].visible and only[10] == gr.skip()
    assert drawn_pairs(answers.studio.project(visitor, key)) == []


def test_widths_stand_side_by_side_only_if_they_draw_alike(answers, visitor, compare):
    for call in (SMALL, f"{SMALL}\nguidance_scale=1"):
        key = packed(answers, visitor, call=call)
        *_, last = compare.draw(visitor, key, 1, [], 1, None, "a fox", "")
    assert "<img" not in last[5] and "at another width" in last[5]
