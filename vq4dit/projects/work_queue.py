"""Whose turn it is: the server's own queue, so that work goes on though nobody looks on.

One long-lived thread works on one task after the other, the first that came first. Pipelines are shared, and recording hangs
hooks into them: so nothing else computes. When others wait, a task that is not done after a turn's time goes to the end of the
queue; all that it has finished is on disk. Pages come, look on and go as they like.

    waiting   ──turn──▶  at work  ──▶  over
       ▲                    │
       └── its turn is over ┘

A project that shall be quantized is marked by a lock on a file of its folder, which the system lets go of when the server dies:
so whoever reads the folder later knows that it waits no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vq4dit.disk.job import TimeBudget
from vq4dit.errors import JobError
from vq4dit.memory import give_back
from vq4dit.progress import OnProgress
from vq4dit.projects.worker import TICK_SECONDS, heed
from vq4dit.projects.workspace import Project


@runtime_checkable
class Task(Protocol):
    """Something to do for a project, in as many turns as it takes."""

    @property
    def project(self) -> Project: ...

    def lined_up(self) -> AbstractContextManager[None]:
        """What holds while it stands in the queue."""

    def turn(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        """Go on until it is done (False), or the time is over (True: it wants another turn)."""

    def seconds_left(self) -> float | None:
        """Of work, about; None if nobody can know yet."""


@dataclass(frozen=True)
class Place:
    """Where a task stands: how many are before it, and seconds until its turn comes, about."""

    before: int
    seconds: float


class Entry:
    """A project in the queue, with its task. `error` is what that failed with; `next` comes after it."""

    def __init__(self, task: Task):
        self.over, self._mark = threading.Event(), ExitStack()
        self.next: Task | None = None
        self.error: Exception | None = None
        self.begin(task)

    def begin(self, task: Task) -> None:
        self._mark.close()
        self._mark.enter_context(task.lined_up())
        self.task, self.error = task, None

    def begins_next(self) -> bool:
        """Whether there was a next task, and it stands in place of this one now."""
        task, self.next = self.next, None
        if task is None:
            return False
        try:
            self.begin(task)
        except Exception as error:
            self.error = error
        return self.error is None

    def end(self) -> None:
        self._mark.close()
        self.over.set()

    def follow(self) -> Iterator[None]:
        """Yield twice a second, until it is over."""
        while not self.over.is_set():
            yield
            self.over.wait(TICK_SECONDS)


class WorkQueue:
    """The tasks of all visitors, and the thread that works on them.

    Args:
        turn_seconds: after which a task makes room for others, if any wait.
        length: how many tasks may wait.
    """

    def __init__(self, turn_seconds: float, length: int):
        self.turn_seconds, self.length = turn_seconds, length
        self._entries: list[Entry] = []  # the first is at work
        self._turn: Turn | None = None
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def put(self, task: Task) -> Entry:
        """Line up at the end. A project stands here once: a later task takes the place of one that waits, and comes after one
        that is at work, which may be ending.

        Raises:
            JobError: if too many wait, or the project stands in another server's queue.
        """
        with self._changed:
            if (known := self._of(task.project)) is not None:
                if self._is_at_work(known):
                    known.next = task
                else:
                    known.begin(task)
                return known
            self.check_room()
            self._entries.append(entry := Entry(task))
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="vq4dit-worker", daemon=True)
                self._worker.start()
            self._changed.notify()
            return entry

    def check_room(self) -> None:
        """Raise `JobError` if no more may wait."""
        with self._changed:
            if len(self._entries) > self.length:  # one is at work
                raise JobError(f"{self.length} jobs wait here already, more are not taken: try again in a while")

    def find(self, project: Project) -> Entry | None:
        """The project's task, waiting or at work."""
        with self._changed:
            return self._of(project)

    def drop(self, project: Project) -> bool:
        """Take a task back that waits; False if there is none, or it is at work."""
        with self._changed:
            entry = self._of(project)
            if entry is None or self._is_at_work(entry):
                return False
            self._remove(entry)
            return True

    def place(self, project: Project) -> Place | None:
        """Where a waiting task stands; None if there is none, or it is at work."""
        with self._changed:
            entry = self._of(project)
            if entry is None or self._is_at_work(entry):
                return None
            before = self._entries[: self._entries.index(entry)]
            at_work = self._turn
        return Place(len(before), sum((self._seconds_of(e, at_work if i == 0 else None) for i, e in enumerate(before)), 0.0))

    def _seconds_of(self, entry: Entry, turn: Turn | None) -> float:
        """What is left of a turn: the task's own rest, if that is shorter."""
        rest = self.turn_seconds if turn is None else max(0.0, self.turn_seconds - turn.spent())
        left = entry.task.seconds_left()
        return rest if left is None else min(rest, left)

    def _of(self, project: Project) -> Entry | None:
        return next((entry for entry in self._entries if entry.task.project.folder == project.folder), None)

    def _is_at_work(self, entry: Entry) -> bool:
        return self._turn is not None and entry is self._entries[0]

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        entry.end()

    def _others_wait(self) -> bool:
        return len(self._entries) > 1

    def _work(self) -> None:
        """The thread's life."""
        while True:
            with self._changed:
                while not self._entries:
                    self._changed.wait()
                entry = self._entries[0]
                self._turn = turn = Turn(self.turn_seconds, self._others_wait)
            goes_on = _did_turn(entry, turn)
            give_back()
            with self._changed:
                self._turn = None
                if goes_on or entry.begins_next():
                    self._entries.append(self._entries.pop(0))
                else:
                    self._remove(entry)


def _did_turn(entry: Entry, turn: Turn) -> bool:
    """Let a task have its turn; whether it wants another one."""
    try:
        return entry.task.turn(turn, heed(entry.task.project))
    except Exception as error:
        entry.error = error
        return False


class Turn(TimeBudget):
    """The time of a turn, which is over only if others wait."""

    def __init__(self, seconds: float, others_wait: Callable[[], bool]):
        super().__init__(seconds)
        self._begun, self._others_wait = time.monotonic(), others_wait

    def allows(self, seconds: float) -> bool:
        return not self._others_wait() or super().allows(seconds)

    def spent(self) -> float:
        return time.monotonic() - self._begun
