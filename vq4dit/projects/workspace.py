"""Where visitors' projects live: a folder each, with a name nobody can guess, swept when old or when all together are large.

    ROOT/VISITOR/PROJECT/                 what is in it: `project.py`

VISITOR is the only key to its projects: 128 random bits that the visitor's browser keeps. All folders are closed to other users
of the machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from vq4dit.config import QuantizationSettings
from vq4dit.disk.files import write_atomically
from vq4dit.disk.locks import locked
from vq4dit.disk.space import folder_bytes
from vq4dit.errors import JobError
from vq4dit.pipelines.references import Components
from vq4dit.projects.project import Project

KEY = re.compile(r"[0-9a-f]{32}")
ABANDONED_SECONDS = 6 * 3600.0  # after which whoever drove a waiting project will hardly come back


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

        That is one that somebody works on or reads, or that waits for its next time slice.
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
    lock, held, place = (locked(project.folder / name) for name in ("lock", "held", "place"))
    with lock as is_free, held as is_unread, place as is_in_no_queue:
        is_expected = project.status().phase == "waiting" and age < ABANDONED_SECONDS
        if not (is_free and is_unread and is_in_no_queue) or is_expected:
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
