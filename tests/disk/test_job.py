"""A job survives everything, and ends in the same bytes."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny import new_pipeline, quick_settings

import vq4dit
from vq4dit import Job, JobError
from vq4dit.disk import files, job
from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import TimeBudget, fingerprint

RUNNER = Path(__file__).parents[1] / "support" / "job_runner.py"
LEARNED = pytest.mark.parametrize("recipe", ["paper", "best"])


@contextmanager
def processes(folder: Path, output: Path, recipe: str) -> Iterator[Callable[[int], int]]:
    """Runs of one job that die at a moment, each a process of its own; a call gives how it ended (`job_runner.py`)."""
    environment = {**os.environ, "PYTHONPATH": str(RUNNER.parents[2])}
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
        *(("cluster", i, 14) for i in range(15)),  # 0: it begins
        *(("calibrate", i, 12) for i in range(13)),
    ]
    assert all(p.metrics["block_mse"] > 0 for p in seen[16:])


def test_progress_of_best_names_its_stages_and_counts_every_step_and_layer_once(pipeline):
    seen = []
    vq4dit.quantize(pipeline, quick_settings(recipe="best"), seen.append)
    assert [(p.stage, p.done, p.total) for p in seen] == [
        *(("sensitivity", i, 10) for i in range(11)),  # denoising steps
        *(("trajectories", i, 10) for i in range(11)),
        *(("bits", i, 14) for i in range(15)),  # layers
        *(("fit", i, 14) for i in range(15)),
    ]
    assert {p.stage for p in seen if not p.is_kept} == {"trajectories"}
    parts = [p.part for p in seen if p.stage == "fit" and p.done]  # layers are not alike
    assert parts == sorted(set(parts)) and parts[0] > 0 and parts[-1] == 1


def test_a_job_of_best_that_was_killed_before_it_was_saved_walks_no_more(tmp_path, pipeline, monkeypatch):
    settings = quick_settings(recipe="best")
    with Job.open(tmp_path, settings, pipeline, resume=False) as opened:
        first = vq4dit.run(opened, pipeline).transformer.state_dict()
    monkeypatch.setattr("vq4dit.recipes.entropy_coded.record_replays", lambda *_: pytest.fail("every layer is fitted"))
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


@pytest.mark.parametrize("resume", [True, False])
def test_two_processes_cannot_work_on_one_job_and_nobody_is_told_to_delete_it(tmp_path, pipeline, resume):
    with Job.open(tmp_path, quick_settings(), pipeline, resume=False):
        with pytest.raises(JobError, match="another process") as told:
            Job.open(tmp_path, quick_settings(), pipeline, resume=resume)
        assert "delete" not in str(told.value)
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
    earlier = {"tuning_steps": 200, "guidance_scale": 4.0}  # constants of earlier versions
    written["calibration"] = written["calibration"] | earlier
    assert vq4dit.QuantizationSettings.from_dict(written) == settings


def test_what_a_call_is_told_and_prompts_survive_the_trip_through_json():
    call = {"guidance_scale": 3.5, "true_cfg_scale": 2, "negative_prompt": "", "use_resolution_binning": False, "height": None}
    settings = vq4dit.QuantizationSettings(call=call, prompts=("a cat", "a dog"))
    again = vq4dit.QuantizationSettings.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings and again.call_arguments == call and hash(again) == hash(settings)
    assert again.call == tuple(sorted(call.items())) and again.prompts == ("a cat", "a dog")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"call": {"prompt": "a cat"}}, "call must leave prompt to vq4dit"),
        ({"call": {"num_inference_steps": 4}}, "call must leave num_inference_steps to vq4dit"),
        ({"call": {"guidance_scale": float("nan")}}, "finite numbers"),
        ({"call": {"not a name": 1}}, "call takes names and texts"),
        ({"prompts": ("a cat", " ")}, "prompts must be a tuple of texts"),
    ],
    ids=str,
)
def test_what_no_call_can_be_told_is_misuse(settings, words):
    with pytest.raises(ValueError, match=words):
        vq4dit.QuantizationSettings(**settings)


def test_another_call_is_another_job(tmp_path, pipeline):
    Job.open(tmp_path, quick_settings(), pipeline, resume=False).close()
    with pytest.raises(JobError, match="other settings"):
        Job.open(tmp_path, quick_settings(call={"guidance_scale": 2.0}), pipeline, resume=True)


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
    with pytest.raises(JobError, match="I/O error.*: mend that and save it again"):
        vq4dit.save(quantized, tmp_path / "out", overwrite=True)
    assert saved_bytes(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_was_half_written_when_its_job_was_killed_is_gone_when_the_job_goes_on(tmp_path, pipeline):
    settings = quick_settings(recipe="kmeans")
    half = tmp_path / "job" / ".vq4dit-0123456789abcdef.partial"
    with Job.open(tmp_path / "job", settings, pipeline, resume=False) as opened:
        (half / "new" / "transformer").mkdir(parents=True)
        (half / "new" / "transformer" / "shard").write_bytes(b"half")
        (half / "lock").touch()
        half.with_name(".vq4dit-0123456789abcde0.partial").write_bytes(b"half")
    with Job.open(tmp_path / "job", settings, pipeline, resume=True) as opened:
        assert {path.name for path in opened.folder.iterdir()} == {"job.json", "lock", "layers"}
        vq4dit.save(vq4dit.run(opened, pipeline), tmp_path / "out", scratch=opened.folder)
        opened.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- a job's folder holds what is ours, and perhaps more ---


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: contents of files, targets of links."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def put(path: Path, content: bytes = b"mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


THEIRS = {
    "a file": lambda folder: put(folder / "notes.txt"),
    "a file among the layers": lambda folder: put(folder / "layers" / "notes.txt"),
    "a folder in the layers": lambda folder: put(folder / "layers" / "old" / "x.safetensors"),
    "a hidden file": lambda folder: put(folder / ".env"),
    "a file called lock": lambda folder: put(folder / "lock"),
    "a LoRA": lambda folder: put(folder / "lora.safetensors", save({"up": torch.ones(2)})),
    "a link to a file": lambda folder: (put(folder.parent / "x"), (folder / "x").symlink_to(folder.parent / "x")),
    "a link called lock": lambda folder: (put(folder.parent / "x"), (folder / "lock").symlink_to(folder.parent / "x")),
    "a link called layers": lambda folder: (
        put(folder.parent / "l" / "x"),
        (folder / "layers").symlink_to(folder.parent / "l"),
    ),
    "a link called job.json": lambda folder: (put(folder.parent / "x", b"{}"), (folder / "job.json").symlink_to("../x")),
    "a folder called job.json": lambda folder: put(folder / "job.json" / "x"),
    "another's job.json": lambda folder: put(folder / "job.json", b'{"name": "my job"}'),
    "a pipe called lock": lambda folder: os.mkfifo(folder / "lock"),
}


@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("theirs", THEIRS.values(), ids=THEIRS.keys())
def test_a_folder_that_is_no_job_of_ours_is_refused_and_left_as_it_is(tmp_path, pipeline, theirs, resume):
    folder = tmp_path / "out.job"
    folder.mkdir()
    theirs(folder)
    before = snapshot(tmp_path)
    with pytest.raises(JobError, match="move (it|.*out.job) away|if nothing in .* is yours"):
        Job.open(folder, quick_settings(), pipeline, resume=resume)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["full", "empty", "nowhere", "job"])
def test_a_job_is_never_behind_a_link(tmp_path, pipeline, target):
    put(tmp_path / "full" / "notes.txt")
    (tmp_path / "empty").mkdir()
    Job.open(tmp_path / "job", quick_settings(), pipeline, resume=False).close()
    (tmp_path / "out.job").symlink_to(tmp_path / target, target_is_directory=True)
    before = snapshot(tmp_path)
    with pytest.raises(JobError, match="out.job is a link or a file.*move it away"):
        Job.open(tmp_path / "out.job", quick_settings(), pipeline, resume=True)
    assert snapshot(tmp_path) == before


def test_what_somebody_put_into_a_job_outlives_it(tmp_path, pipeline):
    with Job.open(tmp_path, quick_settings(recipe="kmeans"), pipeline, resume=False) as opened:
        vq4dit.run(opened, pipeline)
        put(tmp_path / "notes.txt")
        put(tmp_path / "model" / "transformer" / "weights.safetensors")
        put(tmp_path / "layers" / "lora.safetensors", save({"up": torch.ones(2)}))
        piece = next((tmp_path / "layers").glob("transformer*"))
        put(tmp_path / "layers" / "copy.safetensors", piece.read_bytes())  # of a name that we never gave
        (tmp_path / "link.safetensors").symlink_to(tmp_path / "notes.txt")
        theirs = {"notes.txt", "model/transformer/weights.safetensors", "link.safetensors"}
        theirs |= {"layers/lora.safetensors", "layers/copy.safetensors"}
        opened.remove()
    assert snapshot(tmp_path).keys() == theirs and (tmp_path / "notes.txt").read_bytes() == b"mine"


def test_half_a_removal_is_still_a_job_of_ours(tmp_path, pipeline, monkeypatch):
    """A process that is killed while it cleans up can be followed by another, whatever was gone already."""

    class Killed(BaseException):
        pass

    unlink, count = Path.unlink, 0

    def dying(path, **options):
        nonlocal count
        count += 1
        if count == moment:
            raise Killed
        return unlink(path, **options)

    settings, moment = quick_settings(recipe="kmeans"), 0
    while moment < 16:  # 14 pieces, job.json, lock
        moment += 1
        opened = Job.open(tmp_path / "job", settings, pipeline, resume=True)
        vq4dit.run(opened, pipeline)
        count = 0
        with opened, monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Path, "unlink", dying)
            opened.remove()
        assert (tmp_path / "job").exists()
    with Job.open(tmp_path / "job", settings, pipeline, resume=True) as opened:
        opened.remove()
    assert not list(tmp_path.iterdir())


# --- a piece is what this job wrote under this name, or an error ---


@pytest.fixture(scope="module")
def clustered(tmp_path_factory) -> Path:
    """A job of kmeans with all its pieces."""
    folder = tmp_path_factory.mktemp("clustered") / "job"
    pipeline = new_pipeline()
    with Job.open(folder, quick_settings(recipe="kmeans"), pipeline, resume=False) as opened:
        vq4dit.run(opened, pipeline)
    return folder


def of_another_job(layers: Path) -> None:
    pipeline, settings = new_pipeline(), quick_settings(recipe="kmeans", seed=1)
    with Job.open(layers.parents[1] / "other", settings, pipeline, resume=False) as opened:
        vq4dit.run(opened, pipeline)
    shutil.copy(layers.parents[1] / "other" / "layers" / FIRST, layers / FIRST)


def flip(position: float):
    def change(layers: Path) -> None:
        content = bytearray((layers / FIRST).read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        (layers / FIRST).write_bytes(content)

    return change


FIRST, SECOND = "transformer_blocks.0.attn1.to_q.safetensors", "transformer_blocks.0.attn1.to_k.safetensors"
TAMPERINGS = {
    "another layer's": lambda layers: shutil.copy(layers / SECOND, layers / FIRST),
    "another job's": of_another_job,
    "cut": lambda layers: (layers / FIRST).write_bytes((layers / FIRST).read_bytes()[:-100]),
    "empty": lambda layers: (layers / FIRST).write_bytes(b""),
    "unsealed": lambda layers: save_file(load_file(layers / FIRST), layers / FIRST),
    "a link": lambda layers: ((layers / FIRST).unlink(), (layers / FIRST).symlink_to(layers / SECOND)),
    "a folder": lambda layers: ((layers / FIRST).unlink(), (layers / FIRST).mkdir()),
    **{f"flipped at {position}": flip(position) for position in (0.0, 0.01, 0.2, 0.5, 0.8, 1.0)},
}


@pytest.mark.parametrize("tamper", TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_a_piece_that_is_not_what_was_written_is_named_and_resuming_without_it_gives_the_same_bytes(
    tmp_path, clustered, pipeline, tamper
):
    folder, settings = tmp_path / "job", quick_settings(recipe="kmeans")
    shutil.copytree(clustered, folder)
    wanted = snapshot(folder)
    tamper(folder / "layers")
    with pytest.raises(JobError, match=f"{FIRST} is damaged.* (delete this file|remove it) and resume"):
        with Job.open(folder, settings, pipeline, resume=True) as opened:
            vq4dit.run(opened, pipeline)
    named = folder / "layers" / FIRST
    named.rmdir() if named.is_dir() else named.unlink()
    with Job.open(folder, settings, pipeline, resume=True) as opened:
        vq4dit.run(opened, pipeline)
    assert snapshot(folder) == wanted


@pytest.mark.parametrize("piece", ["sensitivities", "sensitivities-of-steps", "bits"])
def test_any_piece_of_best_may_be_deleted(tmp_path, pipeline, piece):
    with Job.open(tmp_path, quick_settings(recipe="best"), pipeline, resume=False) as opened:
        first = vq4dit.run(opened, pipeline).transformer.state_dict()
        for path in (tmp_path / f"{piece}.safetensors", *list((tmp_path / "layers").iterdir())[:3]):
            path.unlink()
        again = vq4dit.run(opened, pipeline).transformer.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 100_000, b"null", b'{"version": 10, "settings": [], "fingerprint": ""}', b"{}"], ids=str
)
def test_a_description_that_describes_nothing_is_told(tmp_path, pipeline, content):
    put(tmp_path / "job.json", content[:100_000])
    with pytest.raises(JobError, match="job.json cannot be gone on with"):
        Job.open(tmp_path, quick_settings(), pipeline, resume=True)


def test_the_fingerprint_follows_the_transformers_settings():
    changed = new_pipeline()
    changed.transformer.register_to_config(norm_eps=1e-3)
    assert fingerprint(changed) != fingerprint(new_pipeline())
