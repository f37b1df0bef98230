"""What the commands share: types of arguments, the door to the terminal, and bars for long work."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import Segment

from vq4dit.printable import printable
from vq4dit.progress import OnProgress, Progress

VERBS = {
    "cluster": "clustering layers",
    "calibrate": "calibrating",
    "fit": "fitting layers",
    "sample": "sampling",
    "measure": "measuring the noise",
    "upload": "uploading",
}


class Console(rich.console.Console):
    """The only door to the terminal: what strangers wrote is shown and never obeyed, whichever way it came here."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Parser(argparse.ArgumentParser):
    """Names of files come as arguments too, and what is wrong with one is told with the name."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text!r}")
    return value


def folder_path(text: str) -> Path:
    try:
        text.encode()  # what is no text could not be shown either
        path = Path(text).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder or file ({error})") from error
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must be the name of a folder or file, got {text!r}")
    return path


def picture_path(text: str) -> Path:
    path = folder_path(text)
    if path.suffix.lower() != ".png" or os.path.isdir(path):
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
