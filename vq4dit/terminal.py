"""What the commands share: types of arguments, the device, the door to the terminal, and what is seen of long work."""

from __future__ import annotations

import argparse
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import rich.console
import torch
from rich.console import ConsoleOptions, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import Segment

from vq4dit.devices import DEVICE, describe, resolve
from vq4dit.errors import LeftBehind
from vq4dit.printable import printable
from vq4dit.progress import OnProgress, Progress

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
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


@contextmanager
def notes(console: Console) -> Iterator[None]:
    """Show what a command could not tidy away, whichever warnings are shown otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", LeftBehind)
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, LeftBehind):
                console.print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
            else:
                shown(message, category, *where)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


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


def model_name(text: str) -> str:
    """A Hub id, or the path of a folder, in which a shell may have left the home directory for us."""
    return os.path.expanduser(text) if text.startswith("~") else text


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


def device_name(text: str) -> str:
    if not DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda, cuda:N or mps, got {text!r}")
    return text


def add_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--device",
        type=device_name,
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps (default: auto, a GPU if there is one)",
    )


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device of `--device`, told in the first line on standard error.

    Raises:
        VQ4DiTError: if it is not there.
    """
    device = resolve(args.device)
    sys.stderr.write(f"device: {describe(device)}\n")
    sys.stderr.flush()
    return device


def amount(progress: Progress) -> str:
    """How much is done, of all: pieces, or megabytes of an upload."""
    if progress.stage == "upload":
        return f"{progress.done / 1e6:.1f}/{progress.total / 1e6:.1f} MB"
    return f"{progress.done}/{progress.total}"


def progress_bars() -> AbstractContextManager[OnProgress]:
    """Progress on standard error: bars in a terminal, elsewhere (a log, a pipe) a line now and then."""
    return _bars() if sys.stderr.isatty() else _lines(sys.stderr.write)


@contextmanager
def _lines(write: Callable[[str], object]) -> Iterator[OnProgress]:
    """A line every `LINE_SECONDS`, whether something happened or not, and one at the end of each stage; plain text."""
    lines = ProgressLines(write)
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(LINE_SECONDS):
            lines.tell()

    ticking = threading.Thread(target=tick, daemon=True)
    ticking.start()
    try:
        yield lines.show
    finally:
        ended.set()
        ticking.join()


class ProgressLines:
    """What was told last, and how fast its stage goes on."""

    def __init__(self, write: Callable[[str], object]):
        self._write = write  # a line
        self._last: Progress | None = None
        self._begun, self._first = 0.0, 0  # when the stage was first heard of, and what was done by then
        self._one_at_a_time = threading.Lock()

    def show(self, progress: Progress) -> None:
        with self._one_at_a_time:
            before, self._last = self._last, progress
            if before is None or progress.stage != before.stage or progress.done < before.done:
                self._begun, self._first = time.monotonic(), progress.done
        if progress.done >= progress.total and (before is None or before.done < before.total or before.stage != progress.stage):
            self.tell()

    def tell(self) -> None:
        with self._one_at_a_time:
            if (progress := self._last) is None:
                return
            seconds = time.monotonic() - self._begun
            line = f"{VERBS[progress.stage]}: {amount(progress)}"
            if progress.done >= progress.total:
                line += f", {_duration(seconds)}"
            elif progress.done > self._first:
                left = seconds * (progress.total - progress.done) / (progress.done - self._first)
                line += f", about {_duration(left)} left"
            self._write(line + "".join(f", {key} {value:.3g}" for key, value in progress.metrics.items()) + "\n")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _bars() -> Iterator[OnProgress]:
    """Bars with the time left, one per stage."""
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
