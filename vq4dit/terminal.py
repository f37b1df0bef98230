"""What the commands share: types of arguments, and bars for long work."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vq4dit.progress import OnProgress, Progress

VERBS = {
    "cluster": "clustering layers",
    "calibrate": "calibrating",
    "fit": "fitting layers",
    "sample": "sampling",
    "measure": "measuring the noise",
    "upload": "uploading",
}


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def model_name(text: str) -> str:
    """A Hub id, or the path of a folder, in which a shell may have left the home directory for us."""
    return os.path.expanduser(text) if text.startswith("~") else text


def folder_path(text: str) -> Path:
    return Path(text).expanduser().resolve()


def picture_path(text: str) -> Path:
    path = folder_path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be the name of a .png file, got {text!r}")
    return path


def amount(progress: Progress) -> str:
    """How much is done, of all: pieces, or megabytes of an upload."""
    if progress.stage == "upload":
        return f"{progress.done / 1e6:.1f}/{progress.total / 1e6:.1f} MB"
    return f"{progress.done}/{progress.total}"


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Bars with the time left on standard error, one per stage."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks or progress.done < bars.tasks[tasks[progress.stage]].completed:
                tasks[progress.stage] = bars.add_task(VERBS[progress.stage], total=progress.total, figures="", amount="")
            figures = "  ".join(f"{key} {value:.3g}" for key, value in progress.metrics.items())
            bars.update(tasks[progress.stage], completed=progress.done, figures=figures, amount=amount(progress))

        yield show
