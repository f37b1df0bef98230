"""Visitors' folders: unguessable, kept apart, swept, and never taken from somebody who works in them."""

import os
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from vq4dit.config import QuantizationSettings
from vq4dit.disk.space import check_space, folder_bytes
from vq4dit.errors import JobError
from vq4dit.progress import Event
from vq4dit.projects import archive
from vq4dit.projects.project import Status
from vq4dit.projects.workspace import Workspace

SETTINGS = QuantizationSettings(recipe="kmeans")


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "jobs")


@pytest.fixture
def project(workspace):
    return workspace.open(workspace.visitor(None), "folder:tiny", SETTINGS)


def age(project, seconds: float) -> None:
    for path in (*project.folder.glob("*"), project.folder):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.mark.parametrize("said", [None, "", "x", "../../etc", "G" * 32, "a" * 31, "a" * 33, 7, ["a" * 32]])
def test_what_is_no_key_of_ours_becomes_a_new_visitor(workspace, said):
    first, second = workspace.visitor(said), workspace.visitor(said)
    assert first != second and len(first) == 32  # 128 bits
    assert workspace.visitor(first) == first


@pytest.mark.parametrize("key", ["..", "../x", "", "/etc", "a" * 40])
def test_only_keys_become_paths(workspace, key):
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        workspace.projects(key)
    with pytest.raises(ValueError, match="32 hexadecimal digits"):
        workspace.project("a" * 32, key)


def test_visitors_do_not_see_each_other(workspace):
    ann, bob = workspace.visitor(None), workspace.visitor(None)
    theirs = [workspace.open(visitor, "folder:tiny", SETTINGS) for visitor in (ann, bob)]
    assert theirs[0].key != theirs[1].key
    assert [p.key for p in workspace.projects(ann)] == [theirs[0].key]
    assert workspace.project(bob, theirs[0].key) is None


def test_the_same_choice_is_the_same_project_and_another_one_is_not(workspace, project):
    visitor = project.folder.parent.name
    assert workspace.open(visitor, "folder:tiny", SETTINGS).key == project.key
    assert workspace.open(visitor, "folder:tiny", QuantizationSettings(recipe="kmeans", seed=1)).key != project.key
    assert workspace.open(visitor, "folder:tiny", SETTINGS, "another commit").key != project.key


def test_folders_are_closed_to_other_users_of_the_machine(workspace, project):
    assert workspace.root.stat().st_mode & 0o077 == 0
    assert project.folder.stat().st_mode & 0o077 == 0
    assert project.folder.parent.stat().st_mode & 0o077 == 0  # its name is the visitor's key


def test_folders_that_an_earlier_version_left_open_are_closed(tmp_path, project, workspace):
    for folder in (workspace.root, project.folder.parent):
        folder.chmod(0o755)
    Workspace(workspace.root)
    assert workspace.root.stat().st_mode & 0o777 == project.folder.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_in_which_something_else_lies_keeps_its_mode(tmp_path):
    (tmp_path / "home").mkdir(mode=0o755)
    (tmp_path / "home" / "letter.txt").write_text("mine")
    Workspace(tmp_path / "home")
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_folders_are_closed_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        workspace = Workspace(tmp_path / "a" / "jobs")
        project = workspace.open(workspace.visitor(None), "folder:tiny", SETTINGS)
    finally:
        os.umask(before)
    for folder in (workspace.root, project.folder.parent, project.folder):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_project_that_nobody_works_on_does_not_run(project):
    with project.claim():
        project.set_status(Status("running", seconds=3.0))
        assert project.is_busy() and project.status().phase == "running"
    status = project.status()
    assert (status.phase, status.seconds) == ("paused", 3.0)
    assert "interrupted" in status.message


def test_only_one_may_work_on_a_project(project, monkeypatch):
    monkeypatch.setattr("vq4dit.projects.project.LEAVING_SECONDS", 0.1)
    with project.claim():
        with pytest.raises(JobError, match="worked on already, perhaps in another tab"):
            with project.claim():
                pass
    with project.claim():
        pass


def test_a_killed_worker_lets_go(project):
    reading, writing = os.pipe()
    if not (worker := os.fork()):
        with project.claim():
            os.write(writing, b"mine")
            time.sleep(60)
    os.read(reading, 4)
    assert project.is_busy()
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert not project.is_busy()


def test_old_projects_are_swept_and_running_ones_never(workspace):
    old, running, fresh = (workspace.open(workspace.visitor(None), "folder:tiny", SETTINGS) for _ in range(3))
    with running.claim():
        age(old, 1000)
        age(running, 2000)
        assert workspace.sweep(max_age_seconds=500.0, max_bytes=10**9) == [old.folder]
    assert running.folder.exists() and fresh.folder.exists()


def test_a_project_that_waits_for_its_next_turn_is_not_swept(workspace):
    waiting, paused = (workspace.open(workspace.visitor(None), "folder:tiny", SETTINGS) for _ in range(2))
    for project, phase in ((waiting, "waiting"), (paused, "paused")):
        project.set_status(Status(phase))
        age(project, 5 * 3600)
    assert workspace.sweep(max_age_seconds=7 * 86400.0, max_bytes=0) == [paused.folder]
    assert waiting.status().phase == "waiting"


def test_a_project_that_nobody_will_come_back_to_is_swept_though_it_waits(workspace, project):
    project.set_status(Status("waiting"))
    age(project, 7 * 3600)
    assert workspace.sweep(max_age_seconds=7 * 86400.0, max_bytes=10**9) == [], "it may stay"
    assert workspace.sweep(max_age_seconds=7 * 86400.0, max_bytes=0) == [project.folder]


def test_a_project_in_a_queue_is_never_swept(workspace, project):
    with project.lined_up():
        project.set_status(Status("queued"))
        age(project, 40 * 86400)
        assert workspace.sweep(max_age_seconds=7 * 86400.0, max_bytes=0) == []
        with pytest.raises(JobError, match="at work, or waits|being worked on"):
            workspace.remove(project)
    assert workspace.sweep(max_age_seconds=7 * 86400.0, max_bytes=0) == [project.folder]


def test_a_project_that_is_being_packed_is_not_swept_and_may_be_worked_on(workspace, project, tmp_path, monkeypatch):
    (project.result / "vae").mkdir(parents=True)
    for name in ("model_index.json", "vae/config.json"):
        (project.result / name).write_text("{}")
    project.set_status(Status("done"))
    swept = []

    def packed(*arguments):
        age(project, 1000)
        swept.extend(workspace.sweep(max_age_seconds=500.0, max_bytes=0))
        with project.claim():
            return write(*arguments)

    write = archive._packed
    monkeypatch.setattr(archive, "_packed", packed)
    names = zipfile.ZipFile(archive.pack(project, tmp_path)).namelist()
    assert swept == [] and names == [f"{project.download_name}/{name}" for name in ("model_index.json", "vae/config.json")]
    age(project, 1000)
    assert workspace.sweep(max_age_seconds=500.0, max_bytes=10**9) == [project.folder]


def test_who_comes_for_a_project_while_it_is_swept_is_told_so(project, monkeypatch):
    (project.folder / "project.json").unlink()
    with pytest.raises(JobError, match="deleted, perhaps to make room.*press Quantize"):
        with project.claim():
            pass


def test_when_all_are_too_large_the_oldest_go_first(workspace):
    projects = [workspace.open(workspace.visitor(None), "folder:tiny", SETTINGS) for _ in range(3)]
    for seconds, project in zip((300, 200, 100), projects, strict=True):
        (project.folder / "large").write_bytes(bytes(1000_000))
        age(project, seconds)
    assert workspace.sweep(max_age_seconds=1e9, max_bytes=2_100_000) == [projects[0].folder]


def test_files_that_vanish_while_somebody_looks_are_passed_over(workspace, project):
    """A worker renames its temporary files and removes `stop` all the time; a link to nothing is listed and not there too."""
    (project.folder / ".layers.json.partial").symlink_to("gone")
    assert time.time() - 100 < project.last_used() < time.time() + 100 and folder_bytes(project.folder) > 0
    assert [p.key for p in workspace.projects(project.folder.parent.name)] == [project.key]
    assert workspace.sweep(max_age_seconds=500.0, max_bytes=10**9) == []


def test_two_may_write_the_same_file_at_once(project):
    """The page pauses a job that waits, while its worker begins."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: project.set_status(Status("paused", seconds=float(number))), range(200)))
    assert project.status().seconds in range(200)
    assert {path.name for path in project.folder.iterdir()} == {"project.json", "status.json"}


def test_a_log_cut_short_by_a_kill_is_read_up_to_there(project):
    project.add_event(Event("cluster", 1, 4, 0.5, {"figure": 1.0}, "a.0.b"))
    with open(project.folder / "events.jsonl", "a") as file:
        file.write('{"stage": "clu')
    assert project.events() == [Event("cluster", 1, 4, 0.5, {"figure": 1.0}, "a.0.b")]


def test_a_project_of_another_version_is_passed_over(workspace, project):
    (project.folder / "project.json").write_text('{"model": "x", "revision": "", "settings": {"unknown": 1}}')
    visitor = project.folder.parent.name
    assert workspace.projects(visitor) == [] and workspace.project(visitor, project.key) is None
    assert workspace.sweep(max_age_seconds=1e9, max_bytes=10**9) == []


def test_a_full_disk_is_told_before_the_work(tmp_path):
    check_space(tmp_path, 1000)
    with pytest.raises(JobError, match=r"the disk has .* GB left and this needs 1100000.0 GB: remove old results"):
        check_space(tmp_path, 10**15)


def test_a_disk_that_is_nearly_full_is_told_in_bytes_that_are_not_zero(tmp_path, monkeypatch):
    monkeypatch.setattr("vq4dit.disk.space.shutil.disk_usage", lambda folder: SimpleNamespace(free=900))
    with pytest.raises(JobError, match=r"the disk has 900 bytes left and this needs 2.2 kB"):
        check_space(tmp_path, 2000)
