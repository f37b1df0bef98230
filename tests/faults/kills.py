"""Killed at any moment and started again, a command ends in the bytes of one that was left in peace, and nothing is lost.

A moment is the n-th change to the file system, right before which the process dies: moments are the same on every machine.
Some kills come after a part of the time instead, and find the process wherever it is, also in the middle of a write.
After each kill an output is not there, or is whole: the old one, or the new one. Ctrl-C is a kill that is told: exit code
130, no traceback, wherever it comes.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from campaign import Case, Snapshot, lost, seeded, snapshot
from commands import COMPARE, QUANTIZE, SAMPLE
from output_paths import Of, Ours, Tree, plant
from worker import Complaint, Outcome, Worker, environment

TITLE, COUNTED, SHORT = "kills", ("wrong bytes", "user files lost", "leftovers", "tracebacks"), 10
USERS: Tree = {
    "model": Of("model"),
    "notes.txt": "mine",
    ".out.partial/a": "mine",
    ".out.previous/b": "mine",
    "out2.job/c": "mine",
}
MEASURED = {"original_seconds_per_step", "quantized_seconds_per_step", "peak_memory_bytes"}  # never the same twice
SECONDS = 90.0


@dataclass(frozen=True)
class Killed:
    """A command, and how to go on with it."""

    command: str
    wanted: str  # of the models: its output, undisturbed
    again: str = ""  # default: the same command
    tree: Tree = field(default_factory=dict, hash=False)
    output: str = "out"

    def check(self, times: int, how: str, seed: int, name: str, worker: Worker, home: Path) -> Iterator[Complaint]:
        r = seeded(seed, name)
        ours = plant(worker.folder, home, {**USERS, **self.tree})
        before, old, new = snapshot(home), whole(home / self.output), whole(worker.folder / self.wanted)
        for run in range(times + 1):
            command = self.again if run and self.again else self.command
            if run == times:
                outcome = self._run(worker, home, command)
                yield from outcome.complaints((0,))
            else:
                outcome = self._kill(worker, home, command, how, r)
                yield from outcome.complaints((0, 130) if how == "interrupted" else (0, -9))
            found = whole(home / self.output)
            if found not in ({}, old, new):
                yield Complaint("wrong bytes", f"after run {run + 1} {self.output} is neither old nor new: {sorted(found)}")
            yield from lost(before, snapshot(home), ours)
            if found == new and not (home / "out.job").exists():
                return
        if found != new:
            yield Complaint("wrong bytes", f"{self.output} is not as undisturbed: {outcome.output[-300:]}")
        if left := snapshot(home / "out.job").keys() - {"lock"}:  # killed between its last two deletions, it leaves a lock
            yield Complaint("leftovers", f"in out.job: {sorted(left)}")
        if hidden := [name for name in snapshot(home) if re.fullmatch(r"\.vq4dit-\w+\.partial/(new|old)", name)]:
            yield Complaint("leftovers", hidden[0])

    def _run(self, worker: Worker, home: Path, command: str, **kill: float) -> Outcome:
        call, *arguments = command.split()
        return worker.run(home, *([call, *arguments] if call == "save" else ["cli", call, *arguments]), seconds=SECONDS, **kill)

    def _kill(self, worker: Worker, home: Path, command: str, how: str, r: random.Random) -> Outcome:
        whole_run = self._undisturbed(worker, home)
        if how == "in time":
            return self._run(worker, home, command, kill_after=r.uniform(0.02, whole_run.seconds))
        die_with = signal.SIGINT if how == "interrupted" else signal.SIGKILL
        return self._run(worker, home, command, die_at=r.randint(1, whole_run.changes), die_with=die_with)

    def _undisturbed(self, worker: Worker, home: Path) -> Outcome:
        """How many changes there are, and how long it takes; known after the first time."""
        if (worker.folder, self) not in _UNDISTURBED:
            fresh = home.with_name(f"{home.name}-undisturbed")
            plant(worker.folder, fresh, {**USERS, **self.tree})
            _UNDISTURBED[worker.folder, self] = self._run(worker, fresh, self.command)
        return _UNDISTURBED[worker.folder, self]


_UNDISTURBED: dict[tuple[Path, Killed], Outcome] = {}


def whole(path: Path) -> Snapshot:
    """An output, a folder or a file, without the figures that no two runs share."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = snapshot(path)
    if isinstance(report := found.get("report.json"), bytes):
        values = json.loads(report)
        found["report.json"] = json.dumps({key: value for key, value in values.items() if key not in MEASURED})
        found.pop("vq4dit.json", None)  # it has the checksum of that
    return found


def quantize(recipe: str, options: str = "") -> str:
    return f"{QUANTIZE[recipe]} --output out{options}"


OLD: Tree = {"out": Ours("paper")}
KMEANS: Tree = {"kmeans": Of("kmeans")}
COMPARING, SAMPLING = f"{COMPARE} --output out", f"{SAMPLE} --output sample.png"
COMMANDS: dict[str, tuple[int, Killed]] = {  # and how many times at moments
    "kmeans": (8, Killed(quantize("kmeans"), "kmeans", quantize("kmeans", " --resume"))),
    "best": (6, Killed(quantize("best"), "best", quantize("best", " --resume"))),
    "paper": (6, Killed(quantize("paper"), "paper", quantize("paper", " --resume"))),
    "overwrite": (8, Killed(quantize("kmeans", " --overwrite"), "kmeans", quantize("kmeans", " --overwrite --resume"), OLD)),
    "save": (5, Killed("save model out", "saved")),
    "save over": (5, Killed("save model out overwrite", "saved", "", OLD)),
    "compare": (5, Killed(COMPARING, "comparison", "", KMEANS)),
    "compare over": (5, Killed(f"{COMPARING} --overwrite", "comparison", "", {**KMEANS, "out": Ours("comparison of best")})),
    "sample": (3, Killed(SAMPLING, "sample.png", "", KMEANS, "sample.png")),
}


def interrupt_imports(times: int, seed: int, name: str, worker: Worker, home: Path) -> Iterator[Complaint]:
    """Ctrl-C while the interpreter still imports torch: a real process, since that is what takes the time."""
    command = [sys.executable, "-m", "vq4dit", "inspect", str(worker.folder / "model")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    time.sleep(seeded(seed, name).uniform(0.5, 3))
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    if "Traceback" in output:
        yield Complaint("tracebacks", output.strip()[-300:])
    if process.returncode != 130:
        yield Complaint("wrong exit codes", f"{process.returncode}, not 130: {output[-300:]}")


def cases(seed: int) -> list[Case]:
    found = []
    for command, (count, killed) in COMMANDS.items():
        for how, number in [("at moments", count), ("in time", 2), ("interrupted", int("save" not in command))]:
            for i in range(number):
                name = f"kills/{command} {how}/{i}"
                found.append(Case(name, partial(killed.check, 1 + i % 3, how, seed, name)))
    for times in (1, 2):
        name = f"kills/imports interrupted/{times}"
        found.append(Case(name, partial(interrupt_imports, times, seed, name)))
    return found
