"""A recipe is a generator of stages, and what it returns is the quantized transformer.

A stage is a run of pieces: a layer's codebook, say, or its integers. A piece says how it is made of the pieces before it, and
what becomes of it; whether it is on disk already, whether time is left to make it, and how far all is, is known here alone.
What is learned step by step is a stage too, with a checkpoint now and then in place of pieces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vq4dit.disk.job import Job, TimeBudget
from vq4dit.progress import OnProgress, Progress, StageName

CHECKPOINT_SECONDS = 15.0
CHECKPOINT_SHARE = 0.1  # at most this part of the time goes into writing checkpoints
WRITE_BYTES_PER_SECOND = 2e8  # a guess, until the first checkpoint tells

Tensors = dict[str, Tensor]
Tick = Callable[[], None]  # called after each of a piece's own steps, where it has several


def unused(pieces: Mapping[str, Tensors]) -> None:
    """What becomes of a piece that only later pieces are made of."""


@dataclass(frozen=True)
class Piece:
    """What is finished at once.

    Args:
        make: gives its files' names and what is in them, and calls a `Tick` after each step of its own.
        names: of these files in the job. A piece that has none is made anew whenever the job goes on.
        use: what becomes of them, as they are on disk.
        count: how much of its stage's `total` it is.
        work: how much of its stage's `work` it is.
    """

    make: Callable[[Tick], Iterable[tuple[str, Tensors]]]
    names: tuple[str, ...] = ()
    use: Callable[[Mapping[str, Tensors]], None] = unused
    count: int = 1
    work: float = 0.0


@dataclass(frozen=True)
class Stage:
    """Pieces in their order; each may depend on what became of those before it.

    Args:
        total: of the counts of all its pieces.
        needed_for: files of later stages that it is needed for: if they are all on disk, it is left out.
        work: of all its pieces, in any unit; 0 if one takes as long as another.
    """

    name: StageName
    total: int
    pieces: Iterable[Piece]
    needed_for: tuple[str, ...] = ()
    work: float = 0.0


@runtime_checkable
class Learner(Protocol):
    """What learns step by step and can be stopped between two of them."""

    step: int

    def advance(self) -> dict[str, float]: ...
    def tensors(self) -> Tensors: ...
    def restore(self, stored: Tensors) -> None: ...


@dataclass(frozen=True)
class Learning:
    """A stage of `total` steps whose newest state is kept under one name."""

    name: StageName
    total: int
    learner: Learner
    checkpoint: str


Stages = Generator[Stage | Learning, None, nn.Module]


def run_stages(job: Job, stages: Stages, budget: TimeBudget, on_progress: OnProgress) -> nn.Module | None:
    """Go on with a recipe to its end; None if time ran out first: everything finished is on disk.

    Every call makes a piece, or a step, at least: otherwise a job of short slices might never end.
    """
    pace = Pace(budget)
    while True:
        try:
            stage = next(stages)
        except StopIteration as end:
            return end.value
        if isinstance(stage, Learning):
            is_done = _learn(job, stage, pace, on_progress)
        else:
            is_needed = not stage.needed_for or not all(job.has(name) for name in stage.needed_for)
            is_done = not is_needed or _make_pieces(job, stage, pace, on_progress)
        if not is_done:
            stages.close()
            return None


class Pace:
    """How long the last pieces took, and whether there is time for one more."""

    def __init__(self, budget: TimeBudget):
        self.budget, self.slowest = budget, 0.0

    def allows_another(self, extra: float = 0.0) -> bool:
        return not self.slowest or self.budget.allows(2 * (self.slowest + extra))


def _make_pieces(job: Job, stage: Stage, pace: Pace, on_progress: OnProgress) -> bool:
    done, worked, slowest = 0, 0.0, 0.0
    on_progress(Progress(stage.name, done, stage.total))
    for piece in stage.pieces:
        missing = [name for name in piece.names if not job.has(name)]
        ticks = _Ticks(stage, piece, done, worked, on_progress)
        if missing or not piece.names:
            if missing and not pace.allows_another():
                return False
            started = time.monotonic()
            for name, tensors in piece.make(ticks):
                if name in missing:
                    job.write(name, tensors)
            if missing:
                slowest = max(slowest, time.monotonic() - started)
                pace.slowest = slowest  # of this stage: those of another take another time
        piece.use({name: job.read(name) for name in piece.names})
        done, worked = done + piece.count, worked + piece.work
        ticks.tell(piece.count)
    return True


class _Ticks:
    """Tells a piece's own steps; the last one is told when the piece is on disk and in use."""

    def __init__(self, stage: Stage, piece: Piece, done: int, worked: float, on_progress: OnProgress):
        self.stage, self.piece, self.done, self.worked, self.on_progress = stage, piece, done, worked, on_progress
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps < self.piece.count:
            self.tell(self.steps)

    def tell(self, steps: int) -> None:
        stage, piece = self.stage, self.piece
        part = (self.worked + piece.work * steps / piece.count) / stage.work if stage.work else None
        self.on_progress(Progress(stage.name, self.done + steps, stage.total, is_kept=bool(piece.names), part=part))


def _learn(job: Job, stage: Learning, pace: Pace, on_progress: OnProgress) -> bool:
    """From the newest checkpoint to the end, with a checkpoint now and then."""
    learner = stage.learner
    if job.has(stage.checkpoint):
        learner.restore(job.read(stage.checkpoint))
    write_seconds = sum(tensor.nbytes for tensor in learner.tensors().values()) / WRITE_BYTES_PER_SECOND
    first_step, written, pace.slowest = learner.step, time.monotonic(), 0.0
    on_progress(Progress(stage.name, first_step, stage.total))
    while learner.step < stage.total:
        started = time.monotonic()
        if not pace.allows_another(write_seconds):
            job.write(stage.checkpoint, learner.tensors())
            return False
        with torch.enable_grad():
            metrics = learner.advance()
        pace.slowest = time.monotonic() - started
        on_progress(Progress(stage.name, learner.step, stage.total, metrics))
        if time.monotonic() - written > max(CHECKPOINT_SECONDS, write_seconds / CHECKPOINT_SHARE):
            started = time.monotonic()
            job.write(stage.checkpoint, learner.tensors())
            written = time.monotonic()
            write_seconds = written - started
    if learner.step > first_step:  # what comes after it can be stopped too
        job.write(stage.checkpoint, learner.tensors())
    return True
