"""Where visitors' projects live: a folder each, with a name nobody can guess, swept when old or when all together are large.

A project is one model with one choice of settings, and everything made from it. All that a page shows is read from its
folder, so a reloaded page, a second tab or a restarted server shows the same.

    ROOT/VISITOR/PROJECT/project.json     model, commit, settings, and whether its other parts are referenced
    ROOT/VISITOR/PROJECT/forecast.json    what the work was expected to take
    ROOT/VISITOR/PROJECT/status.json      phase and what there is to say about it
    ROOT/VISITOR/PROJECT/events.jsonl     progress, one line each
    ROOT/VISITOR/PROJECT/layers.json      finished layers and their errors
    ROOT/VISITOR/PROJECT/work/            the library's resumable job
    ROOT/VISITOR/PROJECT/result/NAME/     the packed model
    ROOT/VISITOR/PROJECT/report/          pictures and report.json
    ROOT/VISITOR/PROJECT/lock             held by whoever works on it; the system lets go of it when a process dies
    ROOT/VISITOR/PROJECT/held             held by whoever packs it up to be taken home
    ROOT/VISITOR/PROJECT/place            held by the server in whose queue it stands
    ROOT/VISITOR/PROJECT/stop             asks that worker to stop

VISITOR is the only key to its projects: 128 random bits that the visitor's browser keeps. All folders are closed to other users
of the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vq4dit.config import QuantizationSettings
from vq4dit.disk.files import write_atomically
from vq4dit.disk.locks import locked
from vq4dit.disk.space import folder_bytes, stat_of
from vq4dit.errors import JobError
from vq4dit.pipelines.references import Components
from vq4dit.progress import Event

KEY = re.compile(r"[0-9a-f]{32}")
LEAVING_SECONDS = 10.0
READING_SECONDS = 120.0
ABANDONED_SECONDS = 6 * 3600.0  # after which whoever drove a waiting project will hardly come back
LOOKING_SECONDS = 0.05  # in which two who only look whether a project is free have passed each other
# "queued" is in a server's queue; "waiting" is before its next turn: whoever drives the work goes on with it.
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
        self.revision: str = values["revision"]  # the commit of a Hub model, so that every turn sees the same weights
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
        """Of work; while it runs, its status file is as old as the turn."""
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
        with locked(self.folder / "lock", LEAVING_SECONDS) as is_mine:
            if not is_mine:
                raise JobError("this project is being worked on already, perhaps in another tab: wait for it, or stop it there")
            if not (self.folder / "project.json").exists():
                raise JobError("this project was removed to make room for others: choose the model again and press Quantize")
            os.utime(self.folder)
            yield

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


class Workspace:
    """All visitors' projects below one folder."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        inside = list(root.iterdir())
        visitors = [path for path in inside if KEY.fullmatch(path.name) and not path.is_symlink()]
        # Earlier versions left visitors' folders open, and the names in the root are their keys. A root in which something else
        # lies too is somebody's own, and stays as it is.
        for folder in [*visitors, *([root] if len(visitors) == len(inside) else [])]:
            folder.chmod(0o700)

    def visitor(self, key: object) -> str:
        """The visitor's own key if it is one of ours, else a new one. Nothing else of a browser's input becomes a path."""
        return key if isinstance(key, str) and KEY.fullmatch(key) else secrets.token_hex(16)

    def projects(self, visitor: str) -> list[Project]:
        """A visitor's projects, the one used last first."""
        folder = self.root / self._checked(visitor)
        found = [_opened(path.parent) for path in folder.glob("*/project.json")]
        return sorted((project for project in found if project), key=Project.last_used, reverse=True)

    def project(self, visitor: str, key: str) -> Project | None:
        folder = self.root / self._checked(visitor) / self._checked(key)
        return _opened(folder) if (folder / "project.json").exists() else None

    def open(
        self, visitor: str, model: str, settings: QuantizationSettings, revision: str = "", components: Components = "copy"
    ) -> Project:
        """The visitor's project of this model and these settings; asking twice gives the same one."""
        description: dict[str, Any] = {"model": model, "revision": revision, "settings": settings.to_dict()}
        description |= {"components": components} if components != "copy" else {}  # so that earlier projects keep their keys
        content = json.dumps(description, indent=1, sort_keys=True)
        key = hashlib.sha256(f"{visitor} {content}".encode()).hexdigest()[:32]
        folder = self.root / self._checked(visitor) / key
        if not (folder / "project.json").exists():
            for closed in (folder.parent, folder):  # a mode is for the last folder only
                closed.mkdir(exist_ok=True, mode=0o700)
            write_atomically(folder / "project.json", content.encode())
        return Project(folder)

    def remove(self, project: Project) -> None:
        """Remove a project that its visitor wants no more.

        Raises:
            JobError: if somebody works on it or reads it.
        """
        if not _removed(project, math.inf):
            raise JobError("this job is being worked on, drawn from or packed: stop that or wait for it, then delete the job")

    def sweep(self, *, max_age_seconds: float, max_bytes: int) -> list[Path]:
        """Remove projects that were not used for long, then the oldest ones until all fit; never one that is at work.

        That is one that somebody works on or reads, or that waits for its next turn.
        """
        folders = [path.parent for path in self.root.glob("*/*/project.json")]
        projects = [project for folder in folders if (project := _opened(folder))]
        ages = {project: time.time() - project.last_used() for project in projects}
        total = sum(folder_bytes(project.folder) for project in projects)
        removed = []
        for project in sorted(projects, key=lambda p: ages[p], reverse=True):
            if ages[project] > max_age_seconds or total > max_bytes:
                num_bytes = folder_bytes(project.folder)
                if _removed(project, ages[project]):
                    total -= num_bytes
                    removed.append(project.folder)
        return removed

    @staticmethod
    def _checked(key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"a key has 32 hexadecimal digits, got {len(key)} characters")
        return key


def _removed(project: Project, age: float) -> bool:
    """Remove a project unless it is at work; whether that was done."""
    lock, held = (locked(project.folder / name) for name in ("lock", "held"))
    with lock as is_free, held as is_unread:
        status = project.status()
        is_expected = status.phase == "queued" or (status.phase == "waiting" and age < ABANDONED_SECONDS)
        if not (is_free and is_unread) or is_expected:
            return False
        (project.folder / "project.json").unlink()  # first, so that half a removal is no project
        shutil.rmtree(project.folder, ignore_errors=True)
        return True


def _opened(folder: Path) -> Project | None:
    """A project, or None if another version of the library wrote it, or it is being swept."""
    try:
        return Project(folder)
    except (ValueError, TypeError, KeyError, FileNotFoundError):
        return None


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log, or None if a kill cut it short."""
    try:
        return json.loads(line)
    except ValueError:
        return None
