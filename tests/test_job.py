"""A job survives everything, and ends in the same bytes."""

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import new_pipeline, quick_settings

import vq4dit
from vq4dit import Job, JobError, files, job
from vq4dit.files import write_atomically
from vq4dit.job import TimeBudget, fingerprint

RUNNER = Path(__file__).with_name("job_runner.py")
LEARNED = pytest.mark.parametrize("recipe", ["paper", "best"])


@contextmanager
def processes(folder: Path, output: Path, recipe: str) -> Iterator[Callable[[int], int]]:
    """Runs of one job that die at a moment, each a process of its own; a call gives how it ended (`job_runner.py`)."""
    environment = {**os.environ, "PYTHONPATH": str(RUNNER.parents[1])}
    command = [sys.executable, "-W", "ignore", RUNNER, folder, output, recipe]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as runner:

        def run_until(moment: int) -> int:
            print(moment, file=runner.stdin, flush=True)
            return int(runner.stdout.readline())

        yield run_until


def saved_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def uninterrupted(tmp_path: Path, recipe: str) -> dict[str, bytes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        vq4dit.save(vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe)), tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    return saved_bytes(tmp_path / "whole")


@LEARNED
def test_killed_at_ten_moments_and_resumed_each_time_it_ends_in_the_same_bytes(tmp_path, recipe):
    # files in order: job.json; best: sensitivities, those of steps, bits; 14 layers; paper: a checkpoint a step
    left = []
    with processes(tmp_path / "job", tmp_path / "out", recipe) as run_until:
        for moment in (1, 2, 3, 2, 3, 2, 3, 2, 2, 2):
            assert run_until(moment) == -9
            assert not (tmp_path / "out").exists()
            assert (found := saved_bytes(tmp_path / "job")) not in left, "killed here before"
            left.append(found)
        assert run_until(0) == 0
    assert not (tmp_path / "job").exists()
    assert saved_bytes(tmp_path / "out") == uninterrupted(tmp_path, recipe)


@LEARNED
def test_slices_of_a_time_budget_end_in_the_same_bytes(tmp_path, recipe):
    pipeline, settings = new_pipeline(), quick_settings(recipe=recipe)
    wanted = uninterrupted(tmp_path, recipe)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    slices = 0
    quantized = None
    while quantized is None:
        with Job.open(tmp_path / "job", settings, pipeline, resume=True) as opened:
            quantized = vq4dit.run(opened, pipeline, seconds=0.4)
        slices += 1
        assert slices < 200
    torch.set_num_threads(threads)
    vq4dit.save(quantized, tmp_path / "sliced")
    assert slices > 1
    assert saved_bytes(tmp_path / "sliced") == wanted


def test_a_time_budget_stops_before_it_is_over(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(job.time, "monotonic", lambda: now)
    budget = TimeBudget(45.0)
    assert budget.allows(44.0)
    now = 40.0
    assert budget.allows(4.0) and not budget.allows(6.0)
    assert TimeBudget(None).allows(1e9)


def test_a_listener_may_cancel_and_nothing_finished_is_lost(tmp_path, pipeline):
    class Cancelled(Exception):
        pass

    def cancel(progress):
        if progress.stage == "cluster" and progress.done == 5:
            raise Cancelled

    settings = quick_settings()
    with pytest.raises(Cancelled), Job.open(tmp_path, settings, pipeline, resume=False) as opened:
        vq4dit.run(opened, pipeline, on_progress=cancel)
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) == 5


def test_progress_counts_every_layer_and_step_once(pipeline):
    seen = []
    vq4dit.quantize(pipeline, quick_settings(), seen.append)
    assert [(p.stage, p.done, p.total) for p in seen] == [
        *(("cluster", i + 1, 14) for i in range(14)),
        *(("calibrate", i + 1, 12) for i in range(12)),
    ]
    assert all(p.metrics["block_mse"] > 0 for p in seen[14:])


def test_progress_of_best_counts_every_layer_once(pipeline):
    seen = []
    vq4dit.quantize(pipeline, quick_settings(recipe="best"), seen.append)
    assert {p.stage for p in seen if not p.done} == {"fit"}  # it walks first, and that may be stopped
    assert [(p.stage, p.done, p.total) for p in seen if p.done] == [
        *(("fit", done, 14) for done in (1, 4, 5, 6, 7, 8, 11, 12, 13, 14)),  # q, k and v together
    ]


def test_a_job_of_best_that_was_killed_before_it_was_saved_walks_no_more(tmp_path, pipeline, monkeypatch):
    settings = quick_settings(recipe="best")
    with Job.open(tmp_path, settings, pipeline, resume=False) as opened:
        first = vq4dit.run(opened, pipeline).transformer.state_dict()
    monkeypatch.setattr("vq4dit.best.calibration_walk", lambda *_: pytest.fail("every layer is fitted"))
    with Job.open(tmp_path, settings, pipeline, resume=True) as opened:
        again = vq4dit.run(opened, pipeline).transformer.state_dict()
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_other_settings_are_refused(tmp_path, pipeline):
    Job.open(tmp_path, quick_settings(), pipeline, resume=False).close()
    with pytest.raises(JobError, match="other settings .bits=2 there, 3 now."):
        Job.open(tmp_path, quick_settings(bits=3), pipeline, resume=True)


def test_other_weights_are_refused(tmp_path, pipeline):
    Job.open(tmp_path, quick_settings(), pipeline, resume=False).close()
    with torch.no_grad():
        pipeline.transformer.proj_out_2.bias[0] += 1e-3
    with pytest.raises(JobError, match="other weights"):
        Job.open(tmp_path, quick_settings(), pipeline, resume=True)


def test_an_unfinished_job_is_not_overwritten(tmp_path, pipeline):
    Job.open(tmp_path, quick_settings(), pipeline, resume=False).close()
    with pytest.raises(JobError, match="unfinished job.*--resume"):
        Job.open(tmp_path, quick_settings(), pipeline, resume=False)


def test_two_processes_cannot_work_on_one_job(tmp_path, pipeline):
    with Job.open(tmp_path, quick_settings(), pipeline, resume=False):
        with pytest.raises(JobError, match="another process"):
            Job.open(tmp_path, quick_settings(), pipeline, resume=True)
    Job.open(tmp_path, quick_settings(), pipeline, resume=True).close()


def test_a_damaged_piece_is_named(tmp_path, pipeline):
    with Job.open(tmp_path, quick_settings(), pipeline, resume=False) as opened:
        (tmp_path / "layers" / "x.safetensors").write_bytes(b"garbage!")
        with pytest.raises(JobError, match="x.safetensors is damaged"):
            opened.read("layers/x")


def test_a_full_disk_is_told_and_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(JobError, match="the disk is full: .*piece.safetensors needs 7 bytes. Free some space and try again"):
        write_atomically(tmp_path / "piece.safetensors", b"content")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_really_full_leaves_no_half_written_result(tmp_path, pipeline):
    """On a real file system of 200 kB, if this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
        with pytest.raises(JobError, match="the disk is full"):
            vq4dit.save(quantized, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


def test_fingerprints_follow_names_shapes_and_values():
    a, b = new_pipeline(), new_pipeline()
    assert fingerprint(a) == fingerprint(b)
    assert fingerprint(a) != fingerprint(new_pipeline(num_layers=3))


def test_another_scheduler_is_another_job():
    changed = new_pipeline()
    changed.scheduler.register_to_config(beta_end=0.03)
    assert fingerprint(changed) != fingerprint(new_pipeline())


def test_pieces_without_a_description_are_not_used(tmp_path, pipeline):
    with Job.open(tmp_path, quick_settings(seed=0), pipeline, resume=False) as opened:
        opened.write("layers/x", {"t": torch.ones(1)})
    (tmp_path / "job.json").unlink()  # as a removal that was killed leaves it
    with Job.open(tmp_path, quick_settings(seed=7), pipeline, resume=False) as opened:
        assert not opened.has("layers/x")


@pytest.mark.parametrize("content", ["{", '{"version": 3}', '{"version": 2}', "[]"])
def test_a_damaged_description_is_told(tmp_path, pipeline, content):
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(JobError, match="delete the folder and start again"):
        Job.open(tmp_path, quick_settings(), pipeline, resume=True)


@LEARNED
def test_a_tiny_time_budget_still_ends(tmp_path, pipeline, recipe):
    """Every slice makes at least one step, however short it is."""
    settings = quick_settings(recipe=recipe, calibration={"steps": 4})
    quantized, slices = None, 0
    while quantized is None and slices < 60:
        with Job.open(tmp_path, settings, pipeline, resume=True) as opened:
            quantized = vq4dit.run(opened, pipeline, seconds=1e-3)
        slices += 1
    assert quantized is not None and slices > 4


def test_settings_survive_the_trip_through_json():
    settings = quick_settings(keep=("*.ff.*",), calibration={"num_candidates": 3})
    assert vq4dit.QuantizationSettings.from_dict(settings.to_dict()) == settings
    assert dataclasses.asdict(settings)["calibration"]["num_candidates"] == 3
    written = settings.to_dict()
    written["calibration"] = written["calibration"] | {"tuning_steps": 200}  # a constant of an earlier version
    assert vq4dit.QuantizationSettings.from_dict(written) == settings


def test_an_output_that_is_not_empty_is_never_overwritten_unasked(tmp_path, pipeline):
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(JobError, match="not empty.*--overwrite"):
        vq4dit.save(quantized, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_old_result(tmp_path, pipeline, monkeypatch):
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
    vq4dit.save(quantized, tmp_path / "out")
    before = saved_bytes(tmp_path / "out")

    def fail(*args, **kwargs):
        raise OSError("I/O error")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="I/O error"):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert saved_bytes(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_save_killed_between_its_two_renames_loses_nothing(tmp_path, pipeline, monkeypatch):
    """The old result is then only under its other name; a save that fails after that must bring it back, not delete it."""

    class Killed(BaseException):
        pass

    def die(path, target):
        if path.name == ".out.partial":
            raise Killed
        return rename(path, target)

    def fail(*args, **kwargs):
        raise OSError("I/O error")

    rename, out = Path.rename, tmp_path / "out"
    quantized = vq4dit.quantize(pipeline, quick_settings(recipe="kmeans"))
    vq4dit.save(quantized, out)
    (out / "README.md").write_text("the old one")
    before = saved_bytes(out)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", die)
        vq4dit.save(quantized, out, overwrite=True)
    assert not out.exists()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="I/O error"):
        patch.setattr(files.os, "fsync", fail)
        vq4dit.save(quantized, out)
    assert saved_bytes(out) == before
    vq4dit.save(quantized, out, overwrite=True)
    assert saved_bytes(out).keys() == before.keys() - {"README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
