"""Learn step by step, with a checkpoint now and then, so that whoever comes next goes on where this process ended."""

from __future__ import annotations

import time
from typing import Protocol, runtime_checkable

from torch import Tensor

from vq4dit.job import Job, TimeBudget
from vq4dit.progress import OnProgress, Progress, Stage

CHECKPOINT_SECONDS = 15.0
CHECKPOINT_SHARE = 0.1  # at most this part of the time goes into writing checkpoints
WRITE_BYTES_PER_SECOND = 2e8  # a guess, until the first checkpoint tells


@runtime_checkable  # tests check all argument types
class Learning(Protocol):
    """What learns: `vq4dit.calibration.Calibration` for `paper`, `vq4dit.tuning.Tuning` for `best`."""

    step: int  # updates made so far

    def advance(self) -> dict[str, float]:
        """Make one update; what to tell of it."""

    def tensors(self) -> dict[str, Tensor]:
        """All that `restore` needs."""

    def restore(self, stored: dict[str, Tensor]) -> None:
        """Go on where `tensors` was called."""


def learn(
    job: Job,
    piece: str,
    learning: Learning,
    steps: int,
    budget: TimeBudget,
    on_progress: OnProgress,
    stage: Stage,
) -> bool:
    """Learn from the newest checkpoint to `steps`, with a checkpoint now and then; False if time ran out."""
    if job.has(piece):
        learning.restore(job.read(piece))
    step_seconds = 0.0
    write_seconds = sum(tensor.nbytes for tensor in learning.tensors().values()) / WRITE_BYTES_PER_SECOND
    first_step = learning.step
    written = time.monotonic()
    while learning.step < steps:
        started = time.monotonic()
        moved_on = learning.step > first_step  # every slice makes at least one step, else a job might never end
        if moved_on and not budget.allows(2 * step_seconds + 2 * write_seconds):
            job.write(piece, learning.tensors())
            return False
        metrics = learning.advance()
        step_seconds = time.monotonic() - started
        on_progress(Progress(stage, learning.step, steps, metrics))
        if time.monotonic() - written > max(CHECKPOINT_SECONDS, write_seconds / CHECKPOINT_SHARE):
            started = time.monotonic()
            job.write(piece, learning.tensors())
            written = time.monotonic()
            write_seconds = written - started
    if learning.step > first_step:  # what comes after it can be stopped too
        job.write(piece, learning.tensors())
    return True
