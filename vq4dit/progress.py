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
    """`done` of `total` pieces of a stage: layers, steps, images or bytes, with the figures measured on the way."""

    stage: StageName
    done: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # {"block_mse": 3.1e-4}


@dataclass(frozen=True)
class Event:
    """A `Progress` as it is remembered, with its time, in seconds of work on this project."""

    stage: str
    done: int
    total: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    layer: str = ""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The listener that does not care."""
