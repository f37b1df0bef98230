"""The server's queue: first come first served, turns while others wait, nothing lost when a page or a server goes."""

import gc
import shutil
import weakref
from pathlib import Path

import pytest
from held_task import PATIENCE, Steps

import vq4dit
from vq4dit.config import QuantizationSettings
from vq4dit.errors import JobError
from vq4dit.pipelines.load import load_pipeline
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.drawn_pairs import Drawing, drawn_pairs, is_complete, report, why_not_drawn
from vq4dit.projects.pair_settings import PairSettings
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.project import Project
from vq4dit.projects.work_queue import WorkQueue
from vq4dit.projects.worker import Quantization
from vq4dit.projects.workspace import Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "jobs")


@pytest.fixture
def new_project(workspace):
    visitor = workspace.visitor(None)
    return lambda seed=0, **settings: workspace.open(
        visitor, "folder:tiny", QuantizationSettings(**({"recipe": "kmeans", "seed": seed} | settings))
    )


@pytest.fixture
def loader(model_folder, tmp_path):
    return Loader(Catalog(tmp_path, Path(model_folder).parent))


def stopped_at_once(queue, task, other):
    """Let a task wait for another one, and ask it to stop before its time comes."""
    before = Steps(other, [])
    entries = queue.put(before), queue.put(task)
    task.project.ask_to_stop()
    before.go()
    wait(*entries)


def wait(*entries):
    for entry in entries:
        assert entry.over.wait(PATIENCE)


def test_tasks_take_turns_while_others_wait_and_go_on_while_nobody_does(new_project):
    queue, log = WorkQueue(slice_seconds=0.0, length=9, of_each=9), []
    tasks = [Steps(new_project(seed), log, count=3) for seed in (1, 2)]
    entries = [queue.put(tasks[0])]
    assert tasks[0].begun.wait(PATIENCE)
    tasks[0].go()
    while not log:
        pass
    entries.append(queue.put(tasks[1]))
    for task in tasks:
        task.go(3)
    wait(*entries)
    assert log[0] == 1 and sorted(log[1:]) == [1, 1, 2, 2, 2] and log[1:] != [1, 1, 2, 2, 2] and log != [1, 1, 1, 2, 2, 2]
    alone = queue.put(Steps(new_project(3), log, count=3).go(3))
    wait(alone)
    assert log[6:] == [3, 3, 3]


def test_a_place_says_how_many_are_before_it_and_how_long_that_takes(new_project):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    tasks = [Steps(new_project(seed), log, left=left) for seed, left in enumerate((30.0, None, 7.0, 500.0))]
    entries = [queue.put(task) for task in tasks]
    assert tasks[0].begun.wait(PATIENCE)
    places = [queue.place(task.project) for task in tasks]
    assert places[0] is None and [place.before for place in places[1:]] == [1, 2, 3]
    assert [place.seconds for place in places[1:]] == pytest.approx([30.0, 130.0, 137.0], abs=20)
    assert queue.place(new_project(99)) is None
    for task in tasks:
        task.go()
    wait(*entries)
    assert log == [0, 1, 2, 3] and all(queue.place(task.project) is None for task in tasks)


def test_who_waits_can_go_and_who_is_at_work_cannot(new_project):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    first, second, third = (Steps(new_project(seed), log) for seed in range(3))
    entries = [queue.put(task) for task in (first, second, third)]
    assert first.begun.wait(PATIENCE)
    assert queue.drop(second.project) and not queue.drop(second.project) and not queue.drop(first.project)
    assert entries[1].over.is_set() and queue.place(third.project).before == 1
    first.go(), third.go()
    wait(*entries)
    assert log == [0, 2]


def test_no_more_wait_than_may(new_project):
    queue, log = WorkQueue(slice_seconds=100.0, length=2, of_each=9), []
    tasks = [Steps(new_project(seed), log) for seed in range(3)]
    entries = [queue.put(task) for task in tasks]
    with pytest.raises(JobError, match="2 jobs wait here already, more are not taken: try again in a while"):
        queue.put(Steps(new_project(3), log))
    for task in tasks:
        task.go()
    wait(*entries)


def test_a_project_stands_in_the_queue_once_and_what_comes_when_it_is_ending_comes_next(new_project):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    project, other = new_project(1), new_project(2)
    first, waiting = Steps(project, log), Steps(other, log)
    entry, of_other = queue.put(first), queue.put(waiting)
    assert first.begun.wait(PATIENCE)
    waiting = Steps(other, log)
    assert queue.put(waiting) is of_other and of_other.task is waiting, "the later wish counts"
    again = Steps(project, log).go()
    assert queue.put(again) is entry, "pages that follow it see the end of all"
    first.go(), waiting.go()
    wait(entry, of_other)
    assert log == [1, 2, 1]


def test_one_visitor_does_not_take_all_places(new_project, workspace):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=2), []
    own = [Steps(new_project(seed), log).go() for seed in range(3)]
    own[0].may_go_on.acquire()
    entries = [queue.put(task) for task in own[:2]]
    with pytest.raises(JobError, match="2 jobs of yours are at work or wait here: let one end, or stop one"):
        queue.put(own[2])
    other = Steps(workspace.open(workspace.visitor(None), "folder:tiny", QuantizationSettings()), log).go()
    entries.append(queue.put(other))
    own[0].go()
    wait(*entries)


def test_what_a_failed_task_computed_is_not_held_and_a_panic_ends_nothing(new_project, loader, monkeypatch):
    class Large:
        pass

    held = []

    def fail(project):
        large = Large()
        held.append(weakref.ref(large))
        raise RuntimeError("no memory")

    queue, project = WorkQueue(slice_seconds=100.0, length=9, of_each=9), new_project(1)
    wait(queue.put(Quantization(project, loader)))
    monkeypatch.setattr(loader, "original", fail)
    entry = queue.put(Drawing(project, loader, PairSettings((0,), num_inference_steps=2)))
    wait(entry)
    gc.collect()
    assert held[0]() is None and "no memory" in why_not_drawn(project).details
    assert "press Draw pairs again" in why_not_drawn(project).next_step and "Resume" not in str(why_not_drawn(project))
    panic = Steps(new_project(2), [])

    def panics(budget, check_stop):
        raise SystemExit(1)

    panic.work = panics
    entries = queue.put(panic), queue.put(Steps(new_project(3), log := []).go())
    wait(*entries)
    assert "SystemExit" in str(entries[0].error) and log == [3]
    monkeypatch.undo()
    wait(queue.put(Drawing(project, loader, PairSettings((0,), num_inference_steps=2))))
    assert why_not_drawn(project) is None and len(drawn_pairs(project)) == 1


def test_a_done_project_is_not_done_again_whoever_asks_for_it(new_project, loader, monkeypatch):
    queue, project = WorkQueue(slice_seconds=100.0, length=9, of_each=9), new_project(1)
    wait(queue.put(Quantization(project, loader)))
    monkeypatch.setattr(loader, "original", lambda project: pytest.fail("it is done"))
    wait(queue.put(Quantization(project, loader)))
    assert project.status().phase == "done"


def test_a_project_that_was_removed_while_it_waited_is_told_as_such(new_project, loader):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    project, before = new_project(2), Steps(new_project(1), log)
    entries = queue.put(before), queue.put(Drawing(project, loader, PairSettings((0,))))
    shutil.rmtree(project.folder)
    before.go()
    wait(*entries)
    assert "this job was deleted" in str(entries[1].error) and not project.folder.exists()


def test_what_fails_is_kept_for_who_looks_on_and_the_next_one_works(new_project):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    broken, good = Steps(new_project(1), log), Steps(new_project(2), log).go()
    broken.work = lambda budget, check_stop: 1 / 0
    entries = [queue.put(task) for task in (broken, good)]
    wait(*entries)
    assert isinstance(entries[0].error, ZeroDivisionError) and entries[1].error is None and log == [2]


def test_work_goes_on_though_nobody_looks_on_and_the_bytes_are_those_of_the_library(
    new_project, loader, model_folder, tmp_path
):
    queue = WorkQueue(slice_seconds=0.01, length=9, of_each=9)
    projects = [new_project(seed) for seed in (1, 2)]
    entries = [queue.put(Quantization(project, loader)) for project in projects]
    looking = entries[0].follow()
    next(looking)
    looking.close()  # the page is closed
    wait(*entries)
    for project in projects:
        assert project.status().phase == "done"
        vq4dit.save(vq4dit.quantize(load_pipeline(model_folder), project.settings), tmp_path / project.key)
        name = "transformer/diffusion_pytorch_model.safetensors"
        assert (project.result / name).read_bytes() == (tmp_path / project.key / name).read_bytes()


def test_a_stop_ends_the_work_and_pictures_come_after_it(new_project, loader):
    queue, project = WorkQueue(slice_seconds=100.0, length=9, of_each=9), new_project(1)
    stopped_at_once(queue, Quantization(project, loader), new_project(9))
    assert project.status().phase == "paused" and "You stopped it" in project.status().message
    wait(queue.put(Quantization(project, loader)))
    assert project.status().phase == "done"
    settings = PairSettings((0, 2), num_inference_steps=2)
    task = Drawing(project, loader, settings)
    assert task.seconds_left() is None
    stopped_at_once(queue, task, new_project(9))
    assert drawn_pairs(project) == []
    wait(queue.put(task))
    assert is_complete(project, settings) and task.seconds_left() == 0.0
    written = (project.report / "report.json").stat().st_mtime_ns
    wait(queue.put(task))
    assert (project.report / "report.json").stat().st_mtime_ns == written and report(project)["num_pairs"] == 2


def test_a_project_knows_that_it_is_queued_and_that_its_server_is_gone(new_project, loader):
    queue, log = WorkQueue(slice_seconds=100.0, length=9, of_each=9), []
    before = Steps(new_project(1), log)
    entries = [queue.put(before), queue.put(Quantization(project := new_project(2), loader))]
    assert project.status().phase == "queued"
    with pytest.raises(JobError, match="waits in the queue of another server"):
        WorkQueue(1.0, 9, 9).put(Quantization(project, loader))
    entries[1]._mark.close()  # as the system does when the server dies
    assert project.status().phase == "paused" and "while this job waited" in Project(project.folder).status().message
    queue.drop(project)
    before.go()
    wait(entries[0])
