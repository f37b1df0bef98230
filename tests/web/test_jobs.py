"""The list of a visitor's jobs, without a browser."""

import re

import gradio as gr
import pytest
from held_task import PATIENCE, Steps
from test_web import answers, compare, drawn, quantized, studio, visitor  # noqa: F401  fixtures

from vq4dit.config import QuantizationSettings
from vq4dit.projects.project import Status
from vq4dit.web.jobs_panel import AT_WORK, DECLINED, UNCHANGED, JobAnswers


@pytest.fixture
def jobs(answers):  # noqa: F811
    return JobAnswers(answers)


def test_a_visitor_without_jobs_is_told_what_will_be_there(jobs, visitor):  # noqa: F811
    radio, show, delete, told = jobs.listed(visitor, "")
    assert (radio.choices, radio.visible, show.visible, delete.visible) == ([], False, False, False)
    assert "Each model you quantize is listed here" in told


def test_all_jobs_are_listed_and_any_can_be_shown(answers, jobs, visitor):  # noqa: F811
    first, second = (quantized(answers, visitor, bits=bits) for bits in (2, 3))
    radio, *_ = jobs.listed(visitor, second)
    assert {key for _, key in radio.choices} == {first, second} and radio.value == second
    assert all(re.fullmatch(r"folder:tiny · [23] bits · kmeans · seed 0 · done · \d+ kB", line) for line, _ in radio.choices)
    assert jobs.listed(visitor, second, first)[0].value is None and jobs.listed(visitor, second, "a" * 32)[0].value == second
    told, went, key, model, bits, recipe, *_ = jobs.show(visitor, second, first, 3, "")
    assert (told, went, key, model, bits, recipe) == ("", 4, first, "folder:tiny", 2, "kmeans")


def test_what_cannot_be_shown_is_told_and_leaves_the_page_as_it_is(answers, studio, jobs, visitor):  # noqa: F811
    first, second = (quantized(answers, visitor, bits=bits) for bits in (2, 3))
    studio.project(visitor, first).set_status(Status("waiting"))
    refused = (
        (second, None, "", "none is chosen"),
        (second, "a" * 32, "", "There is no job here"),
        (first, second, "", "is at work"),
        (second, first, AT_WORK, "is at work"),  # as the browser sees it
    )
    for shown, chosen, added, words in refused:
        told, *rest = jobs.show(visitor, shown, chosen, 0, added)
        assert words in told and tuple(rest) == UNCHANGED
    assert jobs.show(visitor, first, first, 0, AT_WORK)[0] == "", "the page follows it anyway"


def test_only_a_job_that_nobody_works_on_is_deleted(answers, studio, jobs, visitor):  # noqa: F811
    first, second = (quantized(answers, visitor, bits=bits) for bits in (2, 3))
    folder = studio.project(visitor, second).folder
    assert jobs.delete(visitor, first, second, 0, DECLINED) == ("", *UNCHANGED)
    for told, *rest in (jobs.delete(visitor, second, second, 0, AT_WORK), jobs.delete(visitor, first, None, 0, "")):
        assert ("is at work" in told or "none is chosen" in told) and tuple(rest) == UNCHANGED and folder.exists()
    with studio.project(visitor, second).claim():
        told, *rest = jobs.delete(visitor, first, second, 0, "")
        assert "Stop that or wait for it" in told and tuple(rest) == UNCHANGED and folder.exists()
    assert "There is no job here" in jobs.delete(studio.workspace.visitor(None), "", second, 0, "")[0], "another's"
    assert jobs.delete(visitor, first, second, 0, AT_WORK) == ("", *UNCHANGED) and not folder.exists()
    assert len(jobs.delete(visitor, first, first, 0, "")) == 1 + len(UNCHANGED)
    assert studio.workspace.projects(visitor) == []


def test_a_job_without_pictures_shows_none_of_another(answers, compare, visitor):  # noqa: F811
    first, second = (quantized(answers, visitor, bits=bits) for bits in (2, 3))
    assert any("<img" in str(answer[2]) for answer in drawn(compare, visitor, first, [0, 1]))
    of_first, of_second, of_none = (compare.of_job(visitor, key) for key in (first, second, ""))
    assert "<img" in of_first[2] and "2 pairs" in of_first[0]
    assert "Press Draw pairs" in of_second[0] and "When a model is packed" in of_none[0]
    for empty in (of_second, of_none):
        assert not any("<img" in str(part) or "<dd>" in str(part) for part in empty)
    picture = next((answers.studio.project(visitor, first).report).glob("*-original.png"))
    picture.unlink()  # as if another tab were deleting the job
    words = [[part for part in view if isinstance(part, str)] for view in (compare.of_job(visitor, first), of_none)]
    assert words[0] == words[1]


def test_why_pairs_were_not_drawn_is_told_to_who_comes_back_too(answers, compare, visitor, monkeypatch):  # noqa: F811
    key = quantized(answers, visitor)
    with monkeypatch.context() as broken:
        broken.setattr("vq4dit.projects.drawn_pairs._draw_missing", lambda *_: 1 / 0)
        *_, last = drawn(compare, visitor, key, [0])
    for told in (last[0], compare.of_job(visitor, key)[0]):
        assert "The pairs could not be drawn" in told and "press Draw pairs again" in told and "ZeroDivisionError" in told
    assert not last[9].visible and last[10] == gr.skip()
    *_, last = drawn(compare, visitor, key, [0])
    assert "1 pair" in last[0] and "could not" not in compare.of_job(visitor, key)[0]
    with monkeypatch.context() as broken:  # before anything of what is drawn is touched
        broken.setattr("vq4dit.projects.drawn_pairs._draw_missing", lambda *_: 1 / 0)
        assert "could not be drawn" in drawn(compare, visitor, key, [1])[-1][0]
    *_, last = drawn(compare, visitor, key, [0])  # all there already
    assert "1 pair" in last[0] and "could not" not in compare.of_job(visitor, key)[0]


def test_a_drawing_that_waits_keeps_its_job_and_leaves_when_asked(answers, compare, studio, visitor):  # noqa: F811
    key = quantized(answers, visitor)
    other = Steps(studio.workspace.open(visitor, "folder:tiny", QuantizationSettings(seed=9)), [], left=40.0)
    entry = studio.queue.put(other)
    assert other.begun.wait(PATIENCE)
    assert compare.begin_drawing(visitor, key, 0, [0])[2] == 1
    assert compare.watch(visitor, key, 1) == 2, "a page that was reloaded looks on"
    stream = compare.draw(visitor, key, 1, [0], 1)
    assert "1 job before yours, about" in next(stream)[0]
    assert studio.workspace.sweep(max_age_seconds=0.0, max_bytes=0) == []
    compare.halt(visitor, key)
    *_, last = stream
    assert "You stopped it: 0 of 1 pair" in last[0] and compare.watch(visitor, key, 1) == gr.skip()
    other.go()
    assert entry.over.wait(PATIENCE)
