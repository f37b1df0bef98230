"""A project: one model with one choice of settings, and everything made from it, in a folder of its own.

All that a page shows is read from the folder, so a reloaded page, a second tab or a restarted server shows the same.

    project.json     model, commit, settings, and whether its other parts are referenced
    forecast.json    what the work was expected to take
    status.json      phase and what there is to say about it
    events.jsonl     progress, one line each
    layers.json      finished layers and their errors
    work/            the library's resumable job
    result/NAME/     the packed model
    report/          pictures and report.json
    lock             held by whoever works on it; the system lets go of it when a process dies
    held             held by whoever packs it up to be taken home
    place            held by the server in whose queue it stands
    stop             asks that worker to stop
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vq4dit.config import QuantizationSettings
from vq4dit.disk.files import write_atomically
from vq4dit.disk.locks import locked
from vq4dit.disk.space import stat_of
from vq4dit.errors import JobError
from vq4dit.pipelines.references import Components
from vq4dit.progress import Event

LEAVING_SECONDS = 10.0
READING_SECONDS = 120.0
LOOKING_SECONDS = 0.05  # in which two who only look whether a project is free have passed each other
# "queued" is in a server's queue; "waiting" is before its next time slice: whoever drives the work goes on with it.
Phase = Literal["new", "queued", "running", "waiting", "paused", "done", "failed"]


@dataclass(frozen=True)
class Status:
    """The state of a project; `message` says why it is paused or failed, `seconds` of work went into it so far."""

    phase: Phase = "new"
    message: str = ""
    next_step: str = ""
    details: str = ""
    seconds: float = 0.0
    wait_seconds: float = 0.0  # until it makes sense to go on

    @property
    def is_under_way(self) -> bool:
        return self.phase in ("queued", "running", "waiting")


@dataclass(frozen=True)
class Forecast:
    """What was known of the work before it began."""

    num_blocks: int = 0
    stages: dict[str, float] = field(default_factory=dict)  # seconds


class Project:
    """The folder of one visitor's one model at one choice of settings."""

    def __init__(self, folder: Path):
        self.folder = folder
        values = json.loads((folder / "project.json").read_text(encoding="utf-8"))
        self.model: str = values["model"]
        self.revision: str = values["revision"]  # the commit of a Hub model, so that every time slice sees the same weights
        self.settings = QuantizationSettings.from_dict(values["settings"])
        self.components: Components = values.get("components", "copy")

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        """What the packed model is called: "emoji-dit-2bit"."""
        base = re.sub(r"[^A-Za-z0-9._-]", "-", Path(self.model.split(":")[-1]).name) or "model"
        return f"{base}-{self.settings.bits}bit"

    @property
    def title(self) -> str:
        """The same with how it was made: "emoji-dit-2bit · best · seed 0"."""
        return f"{self.name} · {self.settings.recipe} · seed {self.settings.seed}"

    @property
    def download_name(self) -> str:
        """The title as the name of a file: "emoji-dit-2bit-best-seed0"."""
        return f"{self.name}-{self.settings.recipe}-seed{self.settings.seed}"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def result(self) -> Path:
        return self.folder / "result" / self.name

    @property
    def report(self) -> Path:
        return self.folder / "report"

    # --- what a page shows ---

    def forecast(self) -> Forecast:
        path = self.folder / "forecast.json"
        return Forecast(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Forecast()

    def set_forecast(self, forecast: Forecast) -> None:
        write_atomically(self.folder / "forecast.json", json.dumps(asdict(forecast)).encode())

    def status(self) -> Status:
        """The phase; a project that is said to run or to be queued, and does not, was interrupted, and is paused."""
        path = self.folder / "status.json"
        status = Status(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Status()
        if status.phase == "running" and not self.is_busy():
            return Status("paused", "The work was interrupted: the server or its worker was stopped.", seconds=status.seconds)
        if status.phase == "queued" and not self._is_locked("place"):
            return Status("paused", "The server was stopped while this job waited for its turn.", seconds=status.seconds)
        return status

    def seconds_so_far(self, status: Status) -> float:
        """Of work; while it runs, its status file is as old as the time slice."""
        path = self.folder / "status.json"
        running = status.phase == "running" and path.exists()
        return status.seconds + (max(0.0, time.time() - path.stat().st_mtime) if running else 0.0)

    def set_status(self, status: Status) -> None:
        write_atomically(self.folder / "status.json", json.dumps(asdict(status)).encode())

    def events(self) -> list[Event]:
        path = self.folder / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [Event(**values) for values in map(_parsed, lines) if values]

    def add_event(self, event: Event) -> None:
        """Append a line. Not flushed to disk: losing the last lines in a power cut costs a line in a log."""
        with open(self.folder / "events.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    def layers(self) -> list[dict[str, Any]]:
        path = self.folder / "layers.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def set_layers(self, layers: list[dict[str, Any]]) -> None:
        write_atomically(self.folder / "layers.json", json.dumps(layers).encode())

    # --- who works on it ---

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Hold the project while working on it; waits a little for one who is just leaving.

        Raises:
            JobError: if somebody else holds it.
        """
        self._check_there()
        with locked(self.folder / "lock", LEAVING_SECONDS) as is_mine:
            if not is_mine:
                raise JobError("this project is being worked on already, perhaps in another tab: wait for it, or stop it there")
            self._check_there()
            os.utime(self.folder)
            yield

    def _check_there(self) -> None:
        if not (self.folder / "project.json").exists():
            raise JobError("this job was deleted, perhaps to make room for others: choose the model again and press Quantize")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the project from being swept while it is read; whoever works on it may go on.

        Raises:
            JobError: if somebody else reads it for long.
        """
        with locked(self.folder / "held", READING_SECONDS) as is_mine:
            if not is_mine:
                raise JobError("this project is being packed already, perhaps in another tab: try again when that is done")
            yield

    @contextmanager
    def lined_up(self) -> Iterator[None]:
        """Stand in a server's queue.

        Raises:
            JobError: if it stands in another one's.
        """
        with locked(self.folder / "place", 4 * LOOKING_SECONDS) as is_mine:
            if not is_mine:
                raise JobError("this project waits in the queue of another server of this machine: stop it there first")
            yield

    def is_busy(self) -> bool:
        return self._is_locked("lock")

    def _is_locked(self, name: str) -> bool:
        if not self.folder.exists():
            return False
        with locked(self.folder / name, LOOKING_SECONDS) as is_free:
            return not is_free

    def ask_to_stop(self) -> None:
        (self.folder / "stop").touch()

    def forget_stop(self) -> None:
        (self.folder / "stop").unlink(missing_ok=True)

    def is_asked_to_stop(self) -> bool:
        return (self.folder / "stop").exists()

    def last_used(self) -> float:
        """When a file of it changed last; a worker's own come and go while we look."""
        found = [stat for path in (self.folder, *self.folder.glob("*")) if (stat := stat_of(path))]
        return max((stat.st_mtime for stat in found), default=0.0)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log, or None if a kill cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return None
