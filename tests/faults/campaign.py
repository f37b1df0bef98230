"""What a case is, how many are run, and how what they find is counted."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path, PurePath
from queue import SimpleQueue

from worker import Complaint, Worker

Snapshot = dict[str, bytes | str | None]  # by relative path: a file's bytes, a link's target, or None for a folder


@dataclass(frozen=True)
class Case:
    """One thing to try. `check` gets a worker and an empty folder, and says all that is wrong."""

    id: str  # "kind/group/name": repeats the case alone
    check: Callable[[Worker, Path], Iterable[Complaint]] = field(repr=False)

    @property
    def group(self) -> str:
        return self.id.rpartition("/")[0]

    def run(self, worker: Worker) -> list[Complaint]:
        home = Path(tempfile.mkdtemp(dir=worker.folder, prefix="case-"))
        home.chmod(0o755)
        try:
            return list(dict.fromkeys(self.check(worker, home)))
        finally:
            shutil.rmtree(home)
            home.with_name(f"{home.name}.log").unlink(missing_ok=True)


def seeded(seed: int, case_id: str) -> random.Random:
    """The random numbers of a case: the same whichever others are run."""
    return random.Random(f"{seed} {case_id}")


def some_of_each_group(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """A fixed choice of `count` cases, as even as the groups allow: what CI runs."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    for name, group in groups.items():
        seeded(seed, name).shuffle(group)
    order = list(groups.values())
    seeded(seed, "groups").shuffle(order)
    in_turn = [case for rank in zip_longest(*order) for case in rank if case]
    return in_turn[:count]


def run_all(cases: Sequence[Case], folder: Path, jobs: int) -> Iterator[tuple[Case, list[Complaint]]]:
    """Run cases side by side; yields them in their order."""
    idle: SimpleQueue[Worker] = SimpleQueue()
    for _ in range(jobs):
        idle.put(Worker(folder))

    def run(case: Case) -> list[Complaint]:
        worker = idle.get()
        try:
            return case.run(worker)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(jobs) as threads:
        yield from zip(cases, threads.map(run, cases), strict=True)


def report(title: str, counted: Sequence[str], cases: Sequence[Case], complaints: Iterable[Complaint], seconds: float) -> str:
    """ "kills 40, wrong bytes 0, user files lost 0": what is counted is named even where there is none."""
    found = Counter(complaint.kind for complaint in complaints)
    kinds = [*counted, *sorted(found.keys() - set(counted))]
    return ", ".join([f"{title} {len(cases)}", *(f"{kind} {found[kind]}" for kind in kinds)]) + f" ({seconds:.0f} s)"


def snapshot(folder: Path) -> Snapshot:
    """All that is in a folder, links not followed."""
    found: Snapshot = {}
    for path in folder.rglob("*"):
        name = os.fsdecode(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        else:
            found[name] = path.read_bytes()
    return found


def lost(before: Snapshot, after: Snapshot, ours: Collection[str] = ()) -> Iterator[Complaint]:
    """What is no more, or is another, of all that was there and is not `ours`; of a lost folder only the folder."""
    gone = {name for name in before if name not in after and name not in ours}
    for name in sorted(gone):
        holds_something = any(inner == name or inner.startswith(f"{name}/") for inner in gone if before[inner] is not None)
        if holds_something and not any(os.fspath(parent) in gone for parent in PurePath(name).parents):
            yield Complaint("user files lost", f"{name!r} is gone")
    for name in sorted(before.keys() & after.keys() - set(ours)):
        if before[name] != after[name]:
            yield Complaint("user files lost", f"{name!r} was changed")
