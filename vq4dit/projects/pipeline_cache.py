"""Pipelines of projects, the last few kept in memory, on the device that does the work."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from vq4dit.devices import resolve
from vq4dit.disk.revisions import content_revision
from vq4dit.errors import JobError
from vq4dit.pipelines.inspect import tensor_bytes
from vq4dit.pipelines.load import check_access, load_pipeline, source_folder
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.project import Project

KEPT_IN_MEMORY = 3


class Loader:
    """Originals by model and content, packed ones by project.

    Pipelines are shared by those who ask for the same one, so only one of them may compute at a time: recording block
    outputs hangs hooks into the model. The server's queue sees to that (`work_queue.py`), or that of ZeroGPU.

    Sharing must not lend one visitor's access to another: before an original is handed out, the Hub is asked whether this
    login may read it.
    """

    def __init__(self, catalog: Catalog, token: str | None = None, kept: OrderedDict[str, Any] | None = None):
        self.catalog, self._token = catalog, token
        self._kept: OrderedDict[str, Any] = OrderedDict() if kept is None else kept

    def with_login(self, token: str | None) -> Loader:
        """The same pipelines, for one visitor's job: while it waits and works its login is kept, in memory only."""
        return Loader(self.catalog, token, self._kept)

    def original(self, project: Project) -> Any:
        """The model that a project began with.

        Raises:
            VQ4DiTError: if this login may not read it (any more), or it cannot be loaded; JobError if it is another one now.
        """
        with self.catalog.named(project.model) as model:
            return self._original(project, model)

    def _original(self, project: Project, model: str) -> Any:
        check_access(model, self._token)
        if Path(model).is_dir() and project.revision not in ("", content_revision(Path(model))):
            raise JobError(
                f"the files of {project.model.removeprefix('folder:')} have changed since this job began, and it belongs to "
                "what they were: press Quantize to begin a job with what they are now"
            )
        return self._load(model, project.revision or None)

    def source(self, project: Project) -> Path:
        """Where the original's files lie."""
        return source_folder(self.catalog.locate(project.model), project.revision or None, self._token)

    def quantized(self, project: Project) -> Any:
        return self._load(str(project.result), None)

    def original_bytes(self, project: Project) -> int:
        return tensor_bytes(self.catalog.locate(project.model), project.revision or None, self._token)

    def forget(self) -> None:
        """Give the memory of pipelines back that nobody works with."""
        self._kept.clear()

    def _load(self, model: str, revision: str | None) -> Any:
        if Path(model).is_dir():
            revision = content_revision(Path(model))  # the same name may hold another model now
            for old in [old for old in self._kept if old.startswith(f"{model}@") and old != f"{model}@{revision}"]:
                del self._kept[old]
        key = f"{model}@{revision}"
        if key not in self._kept:
            while len(self._kept) >= KEPT_IN_MEMORY:
                self._kept.popitem(last=False)
            self._kept[key] = load_pipeline(model, revision=None if Path(model).is_dir() else revision, token=self._token)
        self._kept.move_to_end(key)
        return self._kept[key].to(resolve())
