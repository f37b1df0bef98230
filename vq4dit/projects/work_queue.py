"""Who works next: the server's own queue, so that work goes on though nobody looks on.

One long-lived thread works on one task after the other, the first that came first. Pipelines are shared, and recording hangs
hooks into them: so nothing else computes. When others wait, a task that is not done after its time slice goes to the end of the
queue; all that it has finished is on disk. Pages come, look on and go as they like.

    waiting   ──time slice──▶  at work  ──▶  over
       ▲                          │
       └──── its time is over ────┘

A project in the queue is marked by a lock on a file of its folder, which the system lets go of when the server dies: so whoever
reads the folder later knows that it waits no more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vq4dit.disk.job import TimeBudget
from vq4dit.errors import JobError
from vq4dit.memory import give_back
from vq4dit.progress import OnProgress
from vq4dit.projects.project import Project
from vq4dit.projects.worker import TICK_SECONDS, heed


@runtime_checkable
class Task(Protocol):
    """Something to do for a project, in as many time slices as it takes."""

    @property
    def project(self) -> Project: ...

    def lined_up(self) -> AbstractContextManager[None]:
        """What holds while it stands in the queue."""

    def work(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        """Go on until it is done (False), or the time is over (True: it wants another time slice)."""

    def seconds_left(self) -> float | None:
        """Of work, about, as the project's folder tells; None if nobody can know yet."""


@dataclass(frozen=True)
class Place:
    """Where a task stands: how many are before it, and seconds until it is at work, about."""

    before: int
    seconds: float


class TimeSlice(TimeBudget):
    """The time of a task at work, which is over only if others wait."""

    def __init__(self, seconds: float, others_wait: Callable[[], bool]):
        super().__init__(seconds)
        self._begun, self._others_wait = time.monotonic(), others_wait

    def allows(self, seconds: float) -> bool:
        return not self._others_wait() or super().allows(seconds)

    def spent(self) -> float:
        return time.monotonic() - self._begun


class Entry:
    """A project in the queue, with its task: `error` is what that failed with, `next` comes after it."""

    def __init__(self, task: Task):
        self.over, self._mark = threading.Event(), ExitStack()
        self.next: Task | None = None
        self.error: Exception | None = None
        self.seconds_left: float | None = None  # as it was when it began to wait
        self.begin(task)

    def begin(self, task: Task) -> None:
        """Let a task stand here, whatever stood here before. A wish to stop was about that."""
        self._mark.close()
        task.project.forget_stop()
        self._mark.enter_context(task.lined_up())
        self.task, self.next, self.error = task, None, None
        self._note_seconds_left()

    def _note_seconds_left(self) -> None:
        with suppress(OSError, ValueError, TypeError):  # a file that cannot be read costs an estimate, not the work
            self.seconds_left = self.task.seconds_left()

    def begins(self, task: Task) -> bool:
        """Let a task stand here; whether that worked."""
        try:
            self.begin(task)
        except Exception as error:
            self.error = error.with_traceback(None)
        return self.error is None

    def work(self, budget: TimeBudget) -> bool:
        """Let the task work for a while; whether it wants another time slice."""
        try:
            goes_on = self.task.work(budget, heed(self.task.project))
        except Exception as error:
            error.__cause__ = error.__context__ = None
            self.error = error.with_traceback(None)  # whose frames hold models
            return False
        except BaseException as error:  # a library's panic: the next one shall have its time all the same
            self.error = RuntimeError(f"{type(error).__name__}: {error}")
            return False
        self._note_seconds_left()
        return goes_on

    def end(self) -> None:
        try:
            self._mark.close()
        finally:
            self.over.set()

    def follow(self) -> Iterator[None]:
        """Yield twice a second, until it is over."""
        while not self.over.is_set():
            yield
            self.over.wait(TICK_SECONDS)


class WorkQueue:
    """The tasks of all visitors, and the thread that works on them.

    Args:
        slice_seconds: after which a task makes room for others, if any wait.
        length: how many tasks may wait.
        of_each: how many of one visitor may be here.
    """

    def __init__(self, slice_seconds: float, length: int, of_each: int):
        self.slice_seconds, self.length, self.of_each = slice_seconds, length, of_each
        self._entries: list[Entry] = []  # the first is at work
        self._slice: TimeSlice | None = None
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def put(self, task: Task) -> Entry:
        """Line up at the end. A project stands here once: a later task takes the place of one that waits, and comes after one
        that is at work, which may be ending.

        Raises:
            JobError: if too many wait, of this visitor or in all, or the project stands in another server's queue.
        """
        with self._changed:
            entry = self._of(task.project)
            if entry is None:
                self._check_room(task.project)
                self._entries.append(entry := Entry(task))
                self._start()
            elif self._is_at_work(entry):
                entry.next = task
            else:
                self._begin(entry, task)
            return entry

    def find(self, project: Project) -> Entry | None:
        """The project's entry, waiting or at work."""
        with self._changed:
            return self._of(project)

    def drop(self, project: Project) -> bool:
        """Take back what waits; False if nothing does, but something may be at work."""
        with self._changed:
            entry = self._of(project)
            if entry is None:
                return False
            if self._is_at_work(entry):
                entry.next = None
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
            return Place(len(before), sum((self._seconds_of(other) for other in before), 0.0))

    def _seconds_of(self, entry: Entry) -> float:
        """What is left of an entry's time slice: its own rest, if that is shorter."""
        spent = self._slice.spent() if self._slice is not None and self._is_at_work(entry) else 0.0
        left = self.slice_seconds if entry.seconds_left is None else min(self.slice_seconds, entry.seconds_left)
        return max(0.0, left - spent)

    def _check_room(self, project: Project) -> None:
        own = sum(entry.task.project.folder.parent == project.folder.parent for entry in self._entries)
        if own >= self.of_each:
            raise JobError(f"{own} jobs of yours are at work or wait here: let one end, or stop one in the list of your jobs")
        if len(self._entries) > self.length:  # one is at work
            raise JobError(f"{self.length} jobs wait here already, more are not taken: try again in a while")

    def _of(self, project: Project) -> Entry | None:
        return next((entry for entry in self._entries if entry.task.project.folder == project.folder), None)

    def _is_at_work(self, entry: Entry) -> bool:
        return self._slice is not None and entry is self._entries[0]

    def _begin(self, entry: Entry, task: Task) -> None:
        try:
            entry.begin(task)
        except BaseException:
            self._remove(entry)
            raise

    def _remove(self, entry: Entry) -> None:
        self._entries.remove(entry)
        entry.end()

    def _start(self) -> None:
        if self._worker is None or not self._worker.is_alive():
            self._slice = None
            self._worker = threading.Thread(target=self._run, name="vq4dit-worker", daemon=True)
            self._worker.start()
        self._changed.notify()

    def _run(self) -> None:
        """The thread's life. What a task took is forgotten and given back before the next one, or the next wait."""
        while True:
            with self._changed:
                while not self._entries:
                    self._changed.wait()
            self._work_on_the_first()
            give_back()

    def _work_on_the_first(self) -> None:
        with self._changed:
            if not self._entries:
                return
            entry = self._entries[0]
            self._slice = TimeSlice(self.slice_seconds, lambda: len(self._entries) > 1)
        goes_on = entry.work(self._slice)
        with self._changed:
            self._slice = None
            if entry.begins(entry.next) if entry.next is not None else goes_on:
                self._entries.append(self._entries.pop(0))
            else:
                self._remove(entry)
