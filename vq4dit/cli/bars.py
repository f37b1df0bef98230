"""What is seen of long work: bars in a terminal; in a log or a pipe a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from vq4dit.cli.streams import standard_error
from vq4dit.cli.terminal import errors
from vq4dit.progress import OnProgress, Progress

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
VERBS = {
    "cluster": "clustering layers",
    "calibrate": "calibrating",
    "sensitivity": "measuring what matters",
    "trajectories": "recording trajectories",
    "bits": "allocating bits",
    "fit": "fitting layers",
    "sample": "sampling",
    "measure": "measuring the noise",
    "upload": "uploading",
}


def amount(progress: Progress) -> str:
    """How much is done, of all: pieces, or megabytes of an upload."""
    if progress.stage == "upload":
        return f"{progress.done / 1e6:.1f}/{progress.total / 1e6:.1f} MB"
    return f"{progress.done}/{progress.total}"


def progress_bars() -> AbstractContextManager[OnProgress]:
    """Progress on standard error: bars in a terminal, elsewhere (a log, a pipe) a line now and then."""
    stream = standard_error()
    return _bars() if stream.isatty() else _lines(stream.write)


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
    with Bars(*columns, TextColumn("{task.fields[figures]}"), console=errors()) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.stage not in tasks or progress.done < bars.tasks[tasks[progress.stage]].completed:
                tasks[progress.stage] = bars.add_task(VERBS[progress.stage], total=progress.total, figures="", amount="")
            figures = "  ".join(f"{key} {value:.3g}" for key, value in progress.metrics.items())
            bars.update(tasks[progress.stage], completed=progress.done, figures=figures, amount=amount(progress))

        yield show
