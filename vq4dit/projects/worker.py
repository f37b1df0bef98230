"""Work on a project for a while: a time slice of some seconds, after which everything finished is on disk.

It may end in five ways: the work is done, its time is over, somebody asked to stop, something failed, or the process
is killed. In the first four the project's status says so; after the last nobody holds its lock any more, which says it too.
The next time slice goes on from there and ends in the same bytes.

A server's queue works on a `Quantization` (`work_queue.py`). `work` is one time slice as a generator, because that is what a
GPU worker in another process can stream: it yields at least twice a second, whether something happened or not, and who closes
it ends the time slice. What happened is in the project's folder.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from vq4dit.denoisers import denoiser_of
from vq4dit.disk.job import Job, TimeBudget
from vq4dit.errors import HubError, VQ4DiTError
from vq4dit.evaluation.metrics import LayerError, layer_errors
from vq4dit.layers.entropy_coded import EntropyCodedLinear
from vq4dit.layers.linear_maps import matrix_of, matrix_shape
from vq4dit.layers.packed import PackedLinear
from vq4dit.layers.vector import VQLinear
from vq4dit.memory import is_out_of_memory
from vq4dit.models.blocks import find_targets
from vq4dit.pipelines.hub_errors import without_tokens
from vq4dit.pipelines.provenance import origin_of
from vq4dit.pipelines.save import save
from vq4dit.progress import Event, OnProgress, Progress, ignore
from vq4dit.projects.messages import on_page, without_paths
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.project import Project, Status
from vq4dit.recipes.entropy_coded import ERRORS
from vq4dit.recipes.estimate import seconds_left
from vq4dit.recipes.quantize import run

TICK_SECONDS = 0.5


class Stopped(Exception):
    """Raised in a listener to leave a long task, with the reason; finished pieces are on disk."""


class Left(Stopped):
    """Nobody looks on any more at work that needs its visitor."""


def heed(project: Project) -> OnProgress:
    """A listener that leaves the work when somebody asked to stop."""

    def on_progress(progress: Progress) -> None:
        if project.is_asked_to_stop():
            raise Stopped("You stopped it. Every finished layer is kept.")

    return on_progress


def stream(task: Callable[[OnProgress], Any], check_stop: OnProgress = ignore) -> Iterator[None]:
    """Run a task in a thread and yield twice a second until it ends.

    Closing the generator stops the task at its next progress, but does not wait for that: pages are closed at any time.

    Args:
        check_stop: raises `Stopped` where the task shall end.

    Raises:
        what the task raises.
    """
    ended: queue.Queue[BaseException | None] = queue.Queue()
    closed = threading.Event()

    def on_progress(progress: Progress) -> None:
        check_stop(progress)
        if closed.is_set():
            raise Left("The page was closed or reloaded. Every finished layer is kept.")

    def body() -> None:
        try:
            task(on_progress)
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    threading.Thread(target=body, daemon=True).start()
    try:
        while True:
            try:
                error = ended.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield
                continue
            if error is not None:
                raise error
            return
    finally:
        closed.set()


def work(project: Project, loader: Loader, seconds: float | None = None) -> Iterator[None]:
    """Go on with a project's quantization for `seconds`; afterwards `project.status()` tells how it stands.

    Raises:
        JobError: if somebody else works on it.
    """
    task = Quantization(project, loader)
    yield from stream(lambda check_stop: task.work(TimeBudget(seconds), check_stop), heed(project))


@dataclass(frozen=True)
class Quantization:
    """The work of a project as a task of the queue."""

    project: Project
    loader: Loader

    @contextmanager
    def lined_up(self) -> Iterator[None]:
        with self.project.lined_up():
            if (status := self.project.status()).phase != "done":
                self.project.set_status(Status("queued", seconds=status.seconds))
            yield

    def work(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        """Go on, in a thread that keeps the project claimed until it has really ended; whether it wants another time slice.

        Raises:
            JobError: if somebody else holds the project, which then says so itself.
        """
        try:
            return self._work(budget, check_stop)
        except Exception as error:
            if self.project.status().phase == "queued":
                self.project.set_status(failure(error, self.project.status().seconds))
            raise

    def _work(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        project = self.project
        with project.claim():
            if project.status().phase == "done":  # by another server, while this one waited
                return False
            before = project.status().seconds
            started = time.monotonic()

            def spent() -> float:
                return before + time.monotonic() - started

            project.set_status(Status("running", seconds=before))
            try:
                check_stop(Progress("cluster", 0, 1))
                return _quantize(project, self.loader, budget, spent, check_stop)
            except Left as left:
                project.set_status(Status("waiting", str(left), seconds=spent()))
            except Stopped as stop:
                project.set_status(Status("paused", str(stop), seconds=spent()))
            except Exception as error:
                project.set_status(failure(error, spent()))
        return False

    def seconds_left(self) -> float | None:
        return seconds_left(self.project.events(), self.project.forecast().stages)


def time_left(project: Project, status: Status, time_slice: float = math.inf) -> float | None:
    """Seconds of work to the end of a project, about; None if nobody can know yet.

    Args:
        time_slice: seconds of one.
    """
    now = project.seconds_so_far(status)
    return seconds_left(project.events(), project.forecast().stages, now, time_slice, now - status.seconds)


def failure(error: Exception, seconds: float = 0.0) -> Status:
    """What a failed project says. An error that is not meant for people is named, and its place folded away."""
    if isinstance(error, HubError):  # "what and why. Advice"
        why, _, advice = on_page(error).partition(". ")
        return Status("failed", why, advice, seconds=seconds)
    if isinstance(error, (VQ4DiTError, ValueError)):
        return Status("failed", on_page(error), seconds=seconds)
    if is_out_of_memory(error):
        return Status(
            "failed",
            "The memory was not enough for this model.",
            "Finished layers are kept. Close other programs and press Resume, or choose a smaller model.",
            on_page(error),
            seconds,
        )
    place = "".join(traceback.format_tb(error.__traceback__)[-1:]).strip().splitlines()[-1:]
    return Status(
        "failed",
        "Something went wrong that we did not foresee.",
        "Finished layers are kept: press Resume. If it happens again, report it with the details below.",
        f"{type(error).__name__}: {without_tokens(on_page(error))} · {without_paths(' '.join(place).strip())}",
        seconds,
    )


def _quantize(project: Project, loader: Loader, budget: TimeBudget, spent: Callable[[], float], check_stop: OnProgress) -> bool:
    """The work of a time slice; whether it wants another one."""
    pipeline = loader.original(project)
    settings = project.settings
    targets, _ = find_targets(denoiser_of(pipeline), settings.subvector_dim, settings.num_codewords, settings.keep)
    origin = origin_of(loader.catalog.locate(project.model), project.revision, project.settings)
    layers = project.layers()
    measured = {layer["name"] for layer in layers}
    reached: dict[str, int] = {}
    for event in project.events():
        reached[event.stage] = max(event.done, reached.get(event.stage, 0))

    def on_progress(progress: Progress) -> None:
        new = [name for name in targets if name not in measured and job.has(f"layers/{name}")]
        if new:
            errors = _expected_errors(job)
            layers.extend(_fitted(name, targets[name], job.read(f"layers/{name}")) | errors.get(name, {}) for name in new)
            measured.update(new)
            project.set_layers(layers)
        if not progress.is_kept or progress.done > reached.get(progress.stage, -1):  # a resumed job passes what is on disk
            reached[progress.stage] = progress.done
            counted = progress.stage, progress.done, progress.total
            project.add_event(Event(*counted, spent(), dict(progress.metrics), " ".join(new), progress.part))
        check_stop(progress)

    with Job.open(project.work, project.settings, pipeline, resume=True) as job:
        quantized = run(job, pipeline, budget, on_progress)
        if quantized is None:
            check_stop(Progress("cluster", 0, 1))
            project.set_status(Status("waiting", "This time slice is over; the next one goes on.", seconds=spent()))
            return True
        origin = replace(origin, fingerprint=job.fingerprint)
        source = loader.source(project)
        where: dict[str, Any] = {"source": source, "scratch": project.work, "components": project.components}
        save(quantized, project.result, overwrite=True, origin=origin, **where)
        found, errors = layer_errors(denoiser_of(pipeline), denoiser_of(quantized)), _expected_errors(job)
        project.set_layers([asdict(layer) | errors.get(layer.name, {}) for layer in found])
        project.set_status(Status("done", seconds=spent()))
        job.remove()
        return False


def _expected_errors(job: Job) -> dict[str, dict[str, float]]:
    """Of recipes that share bits out: by layer, its part of the output's error, as it was when they were."""
    errors = {name: value.item() for name, value in job.read(ERRORS).items()} if job.has(ERRORS) else {}
    total = sum(errors.values()) or 1.0
    return {name: {"error_share": error / total} for name, error in errors.items()}


def _fitted(name: str, linear: Any, piece: dict[str, Tensor]) -> dict[str, Any]:
    """A row of the layers table while the job runs: the layer's error before anything is calibrated."""
    shape = matrix_shape(linear)
    layer: PackedLinear
    if EntropyCodedLinear.BYTES[0] in piece:
        layer = EntropyCodedLinear.from_tensors(piece, shape)
    else:
        layer = VQLinear.from_assignments(piece["codebook"].float(), piece["candidates"][:, 0], shape)
    return asdict(LayerError.of(name, layer, matrix_of(linear).float().cpu()))
