"""The page's words and pieces, without a browser: nothing from outside reaches the page unescaped, no answer is a traceback."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote, urlencode

import gradio as gr
import pytest
from held_task import PATIENCE, Steps
from starlette.datastructures import QueryParams

from vq4dit.bundled import BUNDLED
from vq4dit.config import QuantizationSettings
from vq4dit.errors import CalibrationDivergedError, FormatError, HubError, JobError, UnsupportedModelError, VQ4DiTError
from vq4dit.progress import Event
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.drawn_pairs import drawn_pairs
from vq4dit.projects.project import Status
from vq4dit.projects.workspace import Workspace
from vq4dit.web import charts, gpu, html, messages
from vq4dit.web.answers import Answers
from vq4dit.web.choice import Choice
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.endpoints import Endpoints
from vq4dit.web.fields import default_labels
from vq4dit.web.links import asked, chosen, link_of, misunderstood, understood
from vq4dit.web.page import Page
from vq4dit.web.studio import Studio

HOME = Path(__file__).parents[2]
NASTY = '<img src=x onerror="alert(1)">'


@pytest.fixture
def studio(model_folder, tmp_path):
    return Studio(Catalog(HOME, Path(model_folder).parent), Workspace(tmp_path / "jobs"))


@pytest.fixture
def answers(studio):
    return Answers(studio)


@pytest.fixture
def compare(studio):
    return CompareAnswers(studio)


@pytest.fixture
def visitor(studio):
    return studio.workspace.visitor(None)


def quantized(answers, visitor, **changes) -> str:
    """Run a small job to its end; the project's key."""
    choice = {"model": "folder:tiny", "bits": 2, "recipe": "kmeans", "seed": 0, "keep": ""} | changes
    *_, key, turn = answers.begin(visitor, 0, None, *choice.values())
    assert turn == 1
    list(answers.quantize(visitor, key, turn))
    return key


def drawn(compare, visitor, key, labels, seeds=1) -> list[tuple]:
    """Draw pairs to the end; all that the page is sent."""
    assert compare.begin_drawing(visitor, key, 0, labels, seeds)[2] == 1
    return list(compare.draw(visitor, key, 1, labels, seeds))


def test_classes_are_listed_once_for_a_model_so_that_a_late_answer_undoes_no_choice(answers, visitor):
    labels, prompts, guidance, listed = answers.conditions("folder:tiny", "folder:tiny", visitor, "", gr.Request(), None)
    assert (labels, prompts, listed) == (gr.skip(), gr.skip(), "folder:tiny")
    assert "value" not in guidance.constructor_args


# --- words ---


@pytest.mark.parametrize(
    ("error", "what", "why", "next_step"),
    [
        (UnsupportedModelError("ann/x is a LoRA: pick its base"), "cannot be quantized", "ann/x is a LoRA.", "Pick its base."),
        (FormatError("a is damaged: load it again"), "This file cannot be read", "A is damaged.", "Load it again."),
        (JobError("the disk is full: use --resume"), "The work cannot go on", "is full", "Free some space, then press Resume"),
        (CalibrationDivergedError("it diverged: try a seed"), "The calibration diverged", "It diverged.", "Try a seed."),
        (HubError("look at a/b: gated. Ask for it", "gated"), "This model is gated", "Look at a/b: gated.", "Ask for it."),
        (VQ4DiTError("no such thing"), "This cannot be done", "No such thing.", "Change the choice above"),
        (ValueError("bits must be 2"), "One of the settings does not fit", "Bits must be 2.", "Change the choice above"),
        (MemoryError(), "This did not work", "The memory was not enough", "choose a smaller model"),
        (KeyError("x"), "This did not work", "did not foresee", "press Resume"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_every_failure_says_what_why_and_what_next(error, what, why, next_step):
    found = messages.explain(error)
    assert what in found.what and why in found.why and next_step in found.next_step
    shown = html.trouble(found)
    assert 'role="alert"' in shown and "What to do:" in shown and "Traceback" not in shown


@pytest.mark.parametrize(
    ("text", "phase", "message", "next_step", "wait"),
    [
        ("exceeded your free ZeroGPU quota (60s requested). Try again in 3:25:00.", "paused", "used up", "3 h 25", 12300),
        ("exceeded your Pro ZeroGPU quota (60s requested). Try again in 1 day, 0:00:10.", "paused", "used up", "24 h", 86410),
        ("Space app has reached its GPU limit.", "paused", "used up", "Resume tomorrow", 0),
        ("GPU task aborted", "paused", "taken away in the middle", "at most the layer", 0),
        ("No GPU was available", "paused", "No GPU was free", "in a minute", 60),
        ("No GPU was available after 60s. Re-run", "paused", "No GPU was free", "in a minute", 60),
        ("Expired ZeroGPU proxy token", "waiting", "permission to use the GPU ran out", "", 0),
        ("RuntimeError", "paused", "worker failed", "Press Resume", 0),
    ],
)  # fmt: skip
def test_what_the_gpu_scheduler_says_becomes_a_paused_job(text, phase, message, next_step, wait):
    status = gpu.refused(gr.Error(text, title="ZeroGPU"), Status("running", seconds=5.0))
    assert (status.phase, status.wait_seconds, status.seconds) == (phase, wait, 5.0)
    assert message in status.message and next_step in status.next_step


def test_durations_and_sizes_are_for_people():
    assert [messages.duration(s) for s in (0.2, 12, 89, 150, 8000)] == ["0 s", "12 s", "89 s", "2 min", "2 h 13 min"]
    assert [messages.clock(s) for s in (0.9, 12, 125, 3725)] == ["0:00", "0:12", "2:05", "1:02:05"]
    assert [messages.size(n) for n in (12, 4300, 3.61e6, 1.349e9)] == ["12 bytes", "4.3 kB", "3.61 MB", "1.35 GB"]


# --- pieces ---


def test_what_comes_from_outside_is_escaped(studio, visitor):
    trouble = html.trouble(messages.Trouble(NASTY, NASTY, NASTY, NASTY))
    log = html.log([Event(NASTY, 1, 2, 0.1, {NASTY: 1.0}, NASTY)])
    table = html.layers_table([{"name": NASTY, "rows": 1, "columns": 2, "bits_per_weight": 2.0, "relative_error": 0.1}])
    chart = charts.chart([{"name": NASTY, "relative_error": 0.1}], 1, [Event(NASTY, i, 2, 0.1, {NASTY: 1.0}) for i in (1, 2)])
    link = html.copyable("x", link_of(NASTY, Choice(NASTY, 2, "best", 0, "").settings()), "x")
    for shown in (trouble, log, table, chart, link):
        assert "<img" not in shown
    card = Answers(studio).look(None, f"ann/{NASTY}", 2, "best", 0, "")[0]
    assert "<img" not in card and "no model that can be opened" in card


def test_the_log_is_bounded():
    assert html.log([Event("cluster", i, 10**5, 0.1) for i in range(10**4)]).count("\n") < 100


def test_stages_and_figures_nobody_has_heard_of_are_shown(studio, visitor):
    project = studio.begin(visitor, Choice("folder:tiny", 2, "kmeans", 0, ""))
    events = [Event("second_moments", i, 9, float(i), {"new_figure": 1 / i}) for i in (1, 2)]
    assert "Second moments: 2 of 9" in html.progress(project, Status("running"), events, None)
    assert "second_moments: new figure" in charts.chart([{"name": "b.0.x", "relative_error": 0.1}], 2, events)


def test_the_chart_shows_bits_where_they_are_shared_out_and_errors_where_they_are_not():
    def layers(*bits):
        return [{"name": f"b.{i}.x", "bits_per_weight": b, "relative_error": 0.1 + 4 * i} for i, b in enumerate(bits)]

    shown = charts.chart(layers(1.2, 3.4), 3, [], "best")
    assert "Bits per weight of each block" in shown and "1.20 to 3.40" in shown and "4.1" not in shown
    assert "output's error" not in shown
    shares = [layer | {"error_share": share} for layer, share in zip(layers(1.2, 3.4), (0.25, 0.125), strict=True)]
    shares.append({"name": "b.1.y", "bits_per_weight": 1.0, "error_share": 0.5})  # of a block they add up
    assert "expected, in percent, 2 of 3 blocks, 25.0 to 62.5" in charts.chart(shares, 3, [], "best")
    for recipe in ("kmeans", "paper"):
        assert "Error of each block's weights" in charts.chart(layers(1.2, 3.4), 2, [], recipe)
    of_one = [{"name": f"b.0.{i}", "rows": 2 * i, "columns": 3, "bits_per_weight": float(i)} for i in (1, 2)]
    assert "1.67 to 1.67" in charts.chart(of_one, 1, [], "best"), "weights count, not layers"


@pytest.mark.parametrize("recipe", ["kmeans", "best"])
def test_where_more_bits_take_less_the_card_says_why_and_only_there(answers, recipe):
    of_tiny, of_bundled = (answers.look(None, model, 2, recipe, 0, "")[0] for model in ("folder:tiny", BUNDLED))
    assert "3 bits take less than 2 here: a layer's codebook has 256 codewords at 2 bits and 64 codewords at 3 bits" in of_tiny
    assert "take less than" not in of_bundled


def test_the_command_says_what_the_page_would_do():
    settings = Choice("ann/my model", 3, "paper", 5, "*.ff.* a'b").settings()
    command = html.command_of("ann/my model", settings, "out")
    keep = "--keep '*.ff.*' --keep 'a'\\''b'"
    assert command == f"python -m vq4dit quantize 'ann/my model' --bits 3 --recipe paper --seed 5 {keep} --output out"


# --- answers ---


def test_links_restore_settings_and_nonsense_in_them_is_harmless():
    link = {"model": "ann/x", "bits": "4", "recipe": "paper", "seed": "3", "keep": "*.ff.*"}
    assert chosen(link, None) == ("ann/x", 4, "paper", 3, "*.ff.*", "", "copy")
    assert chosen({"model": "ann/x", "bits": "-1", "seed": "x"}, None) == ("ann/x", 2, "best", 0, "", "", "copy")
    assert chosen(link | {"call": "a=1\nb=c"}, None)[5] == "a=1\nb=c"
    assert misunderstood(link) == misunderstood({"bits": "7"}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("bits", "7"), ("bits", "-1"), ("bits", "2.0"), ("recipe", "worst"), ("seed", "3.7"), ("seed", "-1"), ("seed", str(2**53))]
    + [("seed", "9" * 400), ("seed", "<b>"), ("components", "foo"), ("seeds", "9"), ("seeds", "x"), ("guidance", "abc")]
    + [("guidance", "inf"), ("classes", "zebra"), ("classes", "1 " * 13), ("classes", "9" * 5000), ("prompts", "x" * 501)]
    + [("prompts", "\n".join("abcdefghijklm"))],
)
def test_what_a_link_asks_for_and_cannot_be_is_told_and_the_page_has_its_own(name, value):
    link = {"model": "ann/x", name: value}
    assert chosen(link, None) == ("ann/x", 2, "best", 0, "", "", "copy")
    (told,) = misunderstood(link)
    assert told.startswith(f"{name}={value[:40]} is not understood: ")
    assert understood(link) == {"model": "ann/x"}


@pytest.mark.parametrize("seed", [-1, 3.7, 2**53, 1e300])
def test_what_is_no_seed_is_told(answers, seed):
    assert "Seed must be a whole number from 0 to 2^53 - 1" in answers.look(None, "folder:tiny", 2, "best", seed, "")[0]
    assert answers.look(None, "folder:tiny", 2, "best", 2**53 - 1, "")[1] != ""


def test_an_address_that_is_quoted_as_a_whole_asks_for_the_same():
    link = {"model": "ann/x", "call": 'a="1&2"\nb=c d', "prompts": "a fox + a hen"}
    quoted = QueryParams(quote(urlencode(link), safe=""))
    assert asked(gr.Request(query_params=QueryParams(urlencode(link)))) == asked(gr.Request(query_params=quoted)) == link
    for other in ("", "__theme=dark", "view=api&x", "%26%3D"):
        assert "model" not in asked(gr.Request(query_params=QueryParams(other)))


def test_settings_that_do_not_fit_are_told(answers, visitor):
    assert "bits must be one of" in answers.look(None, "folder:tiny", 9, "best", 0, "")[0].lower()
    assert "recipe must be one of" in answers.look(None, "folder:tiny", 2, "worst", 0, "")[0].lower()
    assert "no linear layer of a block matches" in answers.look(None, "folder:tiny", 2, "best", 0, "nothing*")[0].lower()
    told, *_, key, turn = answers.begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "nothing*")
    assert "no linear layer of a block matches" in told.lower()
    assert key == gr.skip() and turn == 0, "the page keeps the job that it shows"


def test_a_full_disk_is_told_before_the_job(answers, visitor, monkeypatch):
    monkeypatch.setattr("vq4dit.disk.space.shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    told = answers.begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "")[0]
    assert "The disk has 1.0 kB left" in told and "Remove old results or choose a smaller model." in told


def test_anothers_project_opens_nothing(answers, studio, visitor, compare):
    key = quantized(answers, visitor)
    stranger = studio.workspace.visitor(None)
    assert "There is no job here" in answers.resume(stranger, key, 0)[0]
    assert "There is no job here" in compare.begin_drawing(stranger, key, 0)[0]
    assert "There is no job here" in answers.download(stranger, key)[1]
    for _ in answers.quantize(stranger, key, 1):
        pass
    assert "There is no job here" in answers.stop(stranger, key)[0]
    assert list(studio.workspace.projects(stranger)) == []


def test_without_a_job_every_step_says_what_to_do_first(answers, visitor, compare):
    assert "Choose a model and press Quantize." in answers.resume(visitor, "", 0)[0]
    assert "Choose a model and press Quantize." in compare.begin_drawing(visitor, "", 0)[0]
    assert "Choose a model and press Quantize." in answers.download(visitor, "")[1]
    *_, key, _ = answers.begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "")
    assert "Quantize the model first" in compare.begin_drawing(visitor, key, 0)[0]
    assert "Quantize the model first." in answers.download(visitor, key)[1]


def test_a_job_streams_ends_and_is_not_done_twice(answers, visitor):
    key = quantized(answers, visitor)
    *view, again, turn = answers.begin(visitor, 5, None, "folder:tiny", 2, "kmeans", 0, "")
    assert again == key and turn == 5 and "is packed" in view[0] and "made before, with these settings" in view[0]


def test_the_command_of_a_folder_is_one_that_a_terminal_understands(answers):
    told = answers.look(None, "folder:tiny", 2, "best", 0, "")[1]
    assert "quantize ROOT/tiny --bits 2" in told and "ROOT is the folder given to --root" in told and "folder:" not in told


def test_a_stop_before_the_turn_pauses_at_once(answers, visitor, studio):
    other = Steps(studio.workspace.open(visitor, "folder:tiny", QuantizationSettings(seed=9)), [], left=40.0)
    entry = studio.queue.put(other)
    assert other.begun.wait(PATIENCE)
    shown, *_, key, turn = answers.begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "")
    assert "Queued" in shown and "1 job before yours, about 40 s" in shown
    *_, (*_, again) = answers.watch(visitor, key, turn)
    assert again == turn + 1, "a page that was reloaded looks on"
    stream = answers.quantize(visitor, key, turn)
    assert "1 job before yours, about 40 s" in next(stream)[0]
    assert "before its turn came" in answers.stop(visitor, key)[0].lower()
    *_, last = stream
    assert "before its turn came" in last[0].lower() and last[7] == gr.skip()
    other.go()
    assert entry.over.wait(PATIENCE)
    assert studio.project(visitor, key).status().phase == "paused"
    *_, (*_, again) = answers.watch(visitor, key, turn)
    assert again == gr.skip()


def test_no_more_jobs_wait_than_may_and_whoever_comes_then_is_told(answers, visitor, studio):
    studio.queue.length = 0
    other = Steps(studio.workspace.open(visitor, "folder:tiny", QuantizationSettings(seed=9)), [])
    studio.queue.put(other)
    told, *_, key, turn = answers.begin(visitor, 0, None, "folder:tiny", 2, "kmeans", 0, "")
    assert "0 jobs wait here already, more are not taken" in told
    assert key == gr.skip() and turn == 0
    other.go()


def test_a_stop_while_somebody_works_is_told_by_the_stream_of_that_work(answers, visitor, studio):
    """An answer of its own could arrive after the last word of the stream, and hide the Resume button."""
    project = studio.workspace.open(visitor, "folder:tiny", QuantizationSettings(recipe="kmeans"))
    key, turn = project.key, 1
    with project.claim():
        project.set_status(Status("running"))
        assert "Stopping" not in answers.view(project)[0]
        assert all(answer == gr.skip() for answer in answers.stop(visitor, key))
        assert "Stopping after this piece" in answers.view(project)[0]
    project.set_status(Status("paused", "You stopped it."))
    *_, last = answers.quantize(visitor, key, turn)
    assert "You stopped it" in last[0] and "Stopping" not in last[0] and last[6].visible
    assert "trouble calm" in last[0] and "alert" not in last[0]  # it was asked for


def test_a_press_on_resume_while_the_stream_of_the_stopped_turn_still_delivers(answers, visitor, studio, monkeypatch):
    """What the old stream has not delivered yet is read when it is delivered, so that it never tells what is over."""
    monkeypatch.setenv("VQ4DIT_SLICE_SECONDS", "3600")  # one turn, however slow the machine is
    *_, key, turn = answers.begin(visitor, 0, None, "folder:tiny", 2, "paper", 0, "")
    old = answers.quantize(visitor, key, turn)
    next(old)
    answers.stop(visitor, key)
    while studio.project(visitor, key).is_busy():
        time.sleep(0.05)
    *_, turn = answers.resume(visitor, key, turn)
    *_, last = answers.quantize(visitor, key, turn)
    assert turn == 2 and "is packed" in last[0]
    assert all("is packed" in late[0] and late[7] == gr.skip() for late in old)


def test_a_page_older_than_the_server_goes_on_with_the_last_job(answers, visitor, studio, compare):
    """Its session is forgotten, so no key comes along; who never had a job is told so."""
    key = quantized(answers, visitor)
    assert studio.project(visitor, "").key == key
    assert compare.begin_drawing(visitor, "", 0, [0])[2] == 1
    assert "There is no job here" in answers.resume(studio.workspace.visitor(None), "", 0)[0]


def test_a_stop_of_the_drawing_is_told_by_its_own_stream(answers, visitor, studio, compare):
    key = quantized(answers, visitor)
    assert compare.begin_drawing(visitor, key, 0, [0, 1], 40)[2] == 1
    drawing = compare.draw(visitor, key, 1, [0, 1], 40)  # more than can be drawn before the first word
    assert re.search(r"Drawing: \d+ of 80 pairs …|Its turn comes now", next(drawing)[0])
    assert compare.halt(visitor, key) is None
    *_, last = drawing
    assert re.search(r"You stopped it: \d+ of 80 pairs. Press Draw pairs to go on.", last[0])
    assert not last[9].visible and last[10] == gr.skip()
    *_, last = drawn(compare, visitor, key, [0, 1])
    assert "2 pairs" in last[0] and "stopped" not in last[0]


def test_the_chosen_pair_stays_while_more_are_drawn(answers, visitor, compare):
    key = quantized(answers, visitor)
    for labels in ([0, 1], [1, 2]):
        sent = [answer[2] for answer in drawn(compare, visitor, key, labels, 10)]
        assert sum("<img" in slider for slider in sent if slider != gr.skip()) in (1, 2)  # of those before, and its own
    project = compare.studio.project(visitor, key)
    pairs = drawn_pairs(project)
    gone = [replace(pairs[0], seed=99)]
    fresh, more, other = (compare.shown(visitor, project, pairs, before) for before in ([], pairs[:3], gone))
    assert fresh[0].value == other[0].value == pairs[0].stem and "<img" in fresh[1] and "<img" in other[1]
    assert more[1] == gr.skip() and more[0].choices == fresh[0].choices and "value" not in more[0].constructor_args


def test_a_page_that_has_no_job_is_told_nothing_by_the_watch(answers, visitor):
    """Its answer might arrive after that to a first click."""
    assert list(answers.watch(visitor, "", 0)) == [(gr.skip(),) * 8], "a stream without a word would empty its outputs"


def test_a_pasted_address_is_the_model_of_its_page():
    page = "https://huggingface.co/ann/tiny-dit"
    assert Choice(page, 2, "best", 0, "").model == "ann/tiny-dit" == chosen({"model": page}, None)[0]


def test_a_hub_that_does_not_answer_is_told(answers):
    everything = answers.studio.catalog.offered()
    assert "The Hub does not answer" in answers.search("some model", everything)[0].info
    assert not answers.search(everything[0][0], everything)[0].info


def test_search_does_not_look_for_what_is_chosen(answers):
    everything = answers.studio.catalog.offered()
    assert answers.search(everything[0][0], everything)[1] == everything


def test_a_name_typed_to_its_end_is_the_first_choice(answers):
    everything = answers.studio.catalog.offered()
    for choice in everything:
        assert answers.search(choice[0], everything)[1] == [choice, *(other for other in everything if other != choice)]


def test_what_is_found_comes_first_and_the_list_never_becomes_shorter(answers):
    everything = answers.studio.catalog.offered()
    shown, seen = answers.search("tiny", everything)
    assert shown.choices == seen and seen[0][1] == "folder:tiny" and sorted(seen) == sorted(everything)
    many = [(str(i), str(i)) for i in range(500)]
    assert len(answers.search("tiny", many)[1]) == 100


def test_a_stop_that_comes_too_late_leaves_the_job_done(answers, visitor, studio):
    key = quantized(answers, visitor)
    assert "is packed" in answers.stop(visitor, key)[0]
    assert studio.project(visitor, key).status().phase == "done"


def test_the_blind_test_hides_the_answer_until_the_guess_and_counts(answers, visitor, compare):
    key = quantized(answers, visitor)
    drawn(compare, visitor, key, [0])
    game: dict = {}
    for round_number in range(1, 4):
        shown, _, game = compare.deal(visitor, key, game)
        assert "original" not in re.sub(r'src="[^"]*"', "", shown)
        shown, score, game = compare.guess_left(visitor, key, game)
        assert "original" in shown and f"of {round_number}" in score
    assert game["total"] == 3


def test_all_widths_of_a_model_stand_side_by_side(answers, visitor, compare):
    for bits in (2, 4):
        key = quantized(answers, visitor, bits=bits)
        *_, last = drawn(compare, visitor, key, [0, 1])
    widths = last[5]
    assert widths.count("<img") == 6 and "4 bits · kmeans" in widths and "original" in widths


def test_default_classes_are_spread_and_different():
    assert default_labels({name: i for i, name in enumerate("abcdefgh")}) == ["a", "c", "e", "g"]
    assert default_labels({"cat": 0, "dog": 1, "fox": 2}) == ["cat", "dog", "fox"]
    assert default_labels({}) == []


# --- the page ---


def test_programs_may_only_inspect_and_estimate(studio):
    page = Page(studio, HOME / "assets" / "original-and-2bit.png")
    shown = page.blocks.get_api_info(all_endpoints=True)
    assert set(shown["named_endpoints"]) == {"/inspect", "/estimate"}
    assert not shown["unnamed_endpoints"]
    assert page.blocks._queue.max_size == 24 and "up to 24 wait" in str(page.blocks.get_config_file())


def test_the_readonly_endpoints_answer(studio):
    endpoints = Endpoints(studio)
    values = endpoints.inspect(BUNDLED)
    assert values["blocks"] == 8 and 3_500_000 < values["predicted_bytes"]["2"] < 3_700_000
    assert str(HOME) not in json.dumps(values)
    assert endpoints.estimate(BUNDLED, 2, "kmeans")["seconds"] > 0
    with pytest.raises(gr.Error, match="no model that can be opened here"):
        endpoints.inspect("/etc/passwd")
