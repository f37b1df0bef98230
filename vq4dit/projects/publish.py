"""Publish a visitor's project: what is offered, the push as something a page can stream, and what is remembered of it.

    PROJECT/pushed.json     where it was published last: names and sums, never a login

The login is an argument of every call and is gone with it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from PIL import Image

from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import TimeBudget
from vq4dit.evaluation.images import grid
from vq4dit.evaluation.metrics import Comparison
from vq4dit.hub.account import Account, look_up_base
from vq4dit.hub.base import default_name, default_visibility
from vq4dit.hub.model_card import model_card, read_report
from vq4dit.hub.push import Pushed, Target, push, same_image
from vq4dit.pipelines.provenance import read_origin
from vq4dit.progress import OnProgress, Progress
from vq4dit.projects.drawn_pairs import KINDS, drawn_pairs
from vq4dit.projects.project import Project
from vq4dit.projects.worker import Stopped, heed, stream

ALIKE = ("original_bytes", "num_pairs", "num_inference_steps", "guidance_scale", "seed", "call")  # of reports in one table


@dataclass(frozen=True)
class Offer:
    """Where a project could go, and how it would be called and shown unless its maker says otherwise."""

    targets: tuple[str, ...]
    name: str
    private: bool
    reason: str  # of `private`


def offer(project: Project, account: Account) -> Offer:
    """What to suggest.

    Raises:
        HubError: if the Hub cannot be reached.
    """
    base = look_up_base(read_origin(project.result), account.token)
    name = default_name(base.model or project.model.removeprefix("folder:"), project.settings.bits)
    return Offer(account.targets, name, *default_visibility(base))


def publish(project: Project, others: list[Project], target: Target, account: Account) -> Iterator[Progress]:
    """Push a finished project; yields how far it came at least twice a second. `project.ask_to_stop()` cancels.

    Args:
        others: the same visitor's projects, among which plain k-means at the same bits is looked for, for the card.

    Raises:
        HubError: see `hub.push`. The same call again goes on.
    """
    latest = [Progress("upload", 0, 1)]
    cancel = Event()

    def task(check_stop: OnProgress) -> None:
        def on_progress(progress: Progress) -> None:
            latest[0] = progress
            try:
                check_stop(progress)
            except Stopped:
                cancel.set()

        with project.claim(), _evidence(project) as extras:
            report, kmeans = _report(project), _kmeans_report(project, others)
            base = look_up_base(read_origin(project.result), account.token)
            card = model_card(project.result, target.repo_id, base, report, kmeans if report else None)
            pushed = push(project.result, target, account, card=card, extras=extras, on_progress=on_progress, cancel=cancel)
            write_atomically(project.folder / "pushed.json", json.dumps(asdict(pushed)).encode())

    project.forget_stop()
    for _ in stream(task, heed(project)):
        yield latest[0]


def pushed_of(project: Project) -> Pushed | None:
    """Where a project was published last."""
    path = project.folder / "pushed.json"
    return Pushed(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


@dataclass(frozen=True)
class DownloadCheck:
    """Downloading what was published and comparing one image bit by bit, as a task of the queue; `found` has the answer."""

    project: Project
    account: Account
    found: list[bool]

    def lined_up(self) -> AbstractContextManager[None]:
        return self.project.lined_up()

    def work(self, budget: TimeBudget, check_stop: OnProgress) -> bool:
        """Do it; it never wants another time slice.

        Raises:
            HubError: if the download fails.
        """
        pushed: Any = pushed_of(self.project)
        self.found.append(same_image(self.project.result, pushed, self.account))
        return False

    def seconds_left(self) -> float | None:
        """Nobody knows how fast the Hub is."""


def _report(project: Project) -> Comparison | None:
    return read_report(project.report) if (project.report / "report.json").exists() else None


def _kmeans_report(project: Project, others: list[Project]) -> Comparison | None:
    """Of plain k-means at the same bits, if the visitor made and measured it in the same way."""
    report = _report(project)
    for other in others:
        same = (other.model, other.revision, other.settings.bits) == (project.model, project.revision, project.settings.bits)
        found = _report(other) if same and other.settings.recipe == "kmeans" and other.key != project.key else None
        if report and found and all(getattr(found, name) == getattr(report, name) for name in ALIKE):
            return found
    return None


@contextmanager
def _evidence(project: Project) -> Iterator[dict[str, Path]]:
    """The files behind the card's figures, by their name in the repository."""
    pairs = drawn_pairs(project)
    if not pairs or _report(project) is None:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [project.report / f"{pair.stem}-{kind}.png" for kind in KINDS for pair in pairs]
        picture = Path(folder) / "samples.png"
        grid([np.asarray(Image.open(file), dtype=np.float32) / 255 for file in files], columns=len(pairs)).save(picture)
        yield {"report.json": project.report / "report.json", "samples.png": picture}
