"""What a long task tells its listener.

The library never prints. Everything that takes longer than a moment accepts `on_progress`, calls it with a `Progress`
after each finished piece, and may be cancelled by an exception raised in the listener: finished pieces are on disk.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

StageName = Literal["cluster", "calibrate", "sensitivity", "trajectories", "bits", "fit", "sample", "measure", "upload"]


@dataclass(frozen=True)
class Progress:
    """`done` of `total` pieces of a stage: layers, steps, images or bytes, with the figures measured on the way.

    A stage of a job also tells where it begins, with 0 pieces or those that its checkpoint holds.
    """

    stage: StageName
    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # {"block_mse": 3.1e-4}
    is_kept: bool = True  # False: nothing of it is on disk, and every time slice of a job makes it anew
    part: float | None = None  # of the stage's work that is done, where pieces are not alike


@dataclass(frozen=True)
class Event:
    """A `Progress` as it is remembered, with its time, in seconds of work on this project."""

    stage: str
    done: int
    total: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    layer: str = ""
    part: float | None = None

    def share(self) -> float:
        """The part of its stage's work that is done."""
        return self.done / max(1, self.total) if self.part is None else self.part


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The listener that does not care."""
