"""Turns of work: they end when asked, when time is over, when something fails; and the bytes do not depend on how many."""

import threading
import time
from pathlib import Path

import pytest
from tiny import quick_settings

import vq4dit
from vq4dit.config import QuantizationSettings
from vq4dit.errors import JobError, UnsupportedModelError
from vq4dit.pipelines.load import load_pipeline
from vq4dit.pipelines.provenance import read_origin
from vq4dit.progress import Progress
from vq4dit.projects.archive import pack
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.drawn_pairs import draw, drawn_pairs, is_complete, report
from vq4dit.projects.pair_settings import PairSettings
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.worker import failure, stream, work
from vq4dit.projects.workspace import Workspace


@pytest.fixture
def loader(model_folder, tmp_path):
    return Loader(Catalog(tmp_path, Path(model_folder).parent))


@pytest.fixture
def new_project(tmp_path):
    workspace = Workspace(tmp_path / "jobs")
    return lambda settings: workspace.open(workspace.visitor(None), "folder:tiny", settings)


def weights(folder):
    return (folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_finished_project_is_what_quantize_and_save_make(new_project, loader, model_folder, tmp_path):
    project = new_project(QuantizationSettings(recipe="kmeans"))
    list(work(project, loader))
    assert project.status().phase == "done" and not project.work.exists()
    vq4dit.save(vq4dit.quantize(load_pipeline(model_folder), project.settings), tmp_path / "direct")
    assert weights(project.result) == weights(tmp_path / "direct")
    assert read_origin(project.result).settings["recipe"] == "kmeans"
    assert [layer["relative_error"] > 0 for layer in project.layers()] == [True] * project.events()[-1].total


def test_many_short_turns_end_in_the_same_bytes(new_project, loader):
    at_once, in_turns = new_project(quick_settings()), new_project(quick_settings())
    list(work(at_once, loader))
    turns = 0
    while in_turns.status().phase != "done":
        list(work(in_turns, loader, seconds=0.05))
        turns += 1
        assert in_turns.status().phase in ("waiting", "done")
    assert turns >= 3
    assert weights(at_once.result) == weights(in_turns.result)


def test_what_a_turn_makes_anew_is_told_again_and_what_it_finds_on_disk_is_not(new_project, loader):
    project, turns = new_project(quick_settings(recipe="best")), 0
    while project.status().phase != "done":
        list(work(project, loader, seconds=0.05))
        turns += 1
    done = {
        name: [e.done for e in project.events() if e.stage == name] for name in ("sensitivity", "trajectories", "bits", "fit")
    }
    assert done["sensitivity"] == list(range(11)) and done["bits"] == done["fit"] == list(range(15))
    assert turns >= done["trajectories"].count(10) > 2


def test_a_wish_to_stop_is_heard_and_resuming_goes_on_to_the_same_bytes(new_project, loader):
    project, other = new_project(quick_settings()), new_project(quick_settings())
    project.ask_to_stop()
    list(work(project, loader))
    assert project.status().phase == "paused" and "You stopped it" in project.status().message
    project.forget_stop()
    list(work(project, loader))
    list(work(other, loader))
    assert project.status().phase == "done" and weights(project.result) == weights(other.result)


def test_closing_a_stream_stops_its_task_without_waiting_for_it():
    may_go_on, ended = threading.Event(), threading.Event()

    def task(on_progress):
        try:
            may_go_on.wait()
            on_progress(Progress("cluster", 1, 2))
        finally:
            ended.set()

    running = stream(task)
    next(running)
    running.close()
    assert not ended.is_set()
    may_go_on.set()
    assert ended.wait(60)


def test_a_stream_ticks_though_nothing_happens():
    may_end = threading.Event()
    running = stream(lambda on_progress: may_end.wait() and None)
    for _ in range(3):
        next(running)
    may_end.set()
    list(running)


def test_a_job_streams_whatever_stage_it_is_in(new_project, loader):
    """What is promised of the page, every second, cannot be better than its source; `benchmarks/app.py` measures the page."""
    for settings in (quick_settings(recipe="best"), quick_settings(calibration={"steps": 60})):
        project = new_project(settings)
        started = time.monotonic()
        ticks = sum(1 for _ in work(project, loader))
        assert project.status().phase == "done" and ticks > time.monotonic() - started


def test_a_job_that_another_tab_has_finished_is_not_done_again(new_project, loader, monkeypatch):
    project = new_project(QuantizationSettings(recipe="kmeans"))
    list(work(project, loader))
    monkeypatch.setattr(loader, "original", lambda project: pytest.fail("it is done"))
    list(work(project, loader))
    assert project.status().phase == "done"


def test_a_failure_is_kept_in_words_and_the_project_can_go_on(new_project, loader, monkeypatch):
    project = new_project(QuantizationSettings(recipe="kmeans"))
    monkeypatch.setattr(loader, "original", lambda project: (_ for _ in ()).throw(RuntimeError("boom")))
    list(work(project, loader))
    status = project.status()
    assert status.phase == "failed" and "did not foresee" in status.message and "press Resume" in status.next_step
    assert "RuntimeError: boom" in status.details and "Traceback" not in status.details
    monkeypatch.undo()
    list(work(project, loader))
    assert project.status().phase == "done"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnsupportedModelError("no: do this"), "no: do this"),
        (MemoryError(), "memory was not enough"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "memory was not enough"),
        (KeyError("x"), "did not foresee"),
    ],
)
def test_failures_have_words(error, words):
    assert words in failure(error).message


def test_pairs_are_drawn_one_by_one_kept_and_measured(new_project, loader, tmp_path):
    project = new_project(QuantizationSettings(recipe="kmeans"))
    with pytest.raises(JobError, match="nothing to download yet: quantize the model first"):
        pack(project, tmp_path)
    list(work(project, loader))
    first, both = (PairSettings(conditions=classes, num_inference_steps=2) for classes in ((0,), (0, 2)))
    list(draw(project, loader, first, seconds=0.0))  # one pair at least, or it might never end
    assert len(drawn_pairs(project)) == 1 and report(project) is None
    list(draw(project, loader, first))
    assert [p.name for p in drawn_pairs(project)] == ["cat"] and report(project)["num_pairs"] == 1
    old = (project.report / f"{drawn_pairs(project)[0].stem}-original.png").stat().st_mtime_ns
    assert is_complete(project, first) and not is_complete(project, both)
    list(draw(project, loader, both))
    assert is_complete(project, both)
    assert (project.report / f"{drawn_pairs(project)[0].stem}-original.png").stat().st_mtime_ns == old
    assert {p.name for p in project.report.glob("*.png")} == {
        f"{p.stem}-{kind}.png" for p in drawn_pairs(project) for kind in ("original", "quantized", "difference")
    }
    assert pack(project, tmp_path).name == "tiny-2bit-kmeans-seed0.zip"
    list(draw(project, loader, first))  # fewer again
    assert is_complete(project, first) and report(project)["num_pairs"] == 1


def test_layers_of_best_tell_their_part_of_the_outputs_error_which_is_all_of_it_together(new_project, loader):
    project = new_project(quick_settings(recipe="best"))
    for _ in work(project, loader):
        assert all("error_share" in layer for layer in project.layers())
    assert sum(layer["error_share"] for layer in project.layers()) == pytest.approx(1)
