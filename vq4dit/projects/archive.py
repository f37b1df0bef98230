"""A finished project as one file to take home: the packed model, loadable as it is, with its report beside the weights."""

from __future__ import annotations

import zipfile
from pathlib import Path

from vq4dit.disk.space import check_space, folder_bytes
from vq4dit.errors import JobError
from vq4dit.projects.project import Project


def pack(project: Project, folder: Path) -> Path:
    """Write NAME.zip, the folder NAME in it, into `folder`. Stored, not deflated: packed weights have nothing left to squeeze.

    Raises:
        JobError: if there is no result yet, or the disk is full.
    """
    if not (project.result / "model_index.json").exists():
        raise JobError("there is nothing to download yet: quantize the model first")
    with project.held():
        return _packed(project, folder)


def _packed(project: Project, folder: Path) -> Path:
    check_space(folder, folder_bytes(project.result) + (folder_bytes(project.report) if project.report.exists() else 0))
    name = project.download_name
    path = folder / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for source, place in ((project.result, name), (project.report, f"{name}/report")):
            for file in sorted(source.rglob("*")):
                if file.is_file() and not file.name.startswith("."):
                    archive.write(file, f"{place}/{file.relative_to(source)}")
    return path
