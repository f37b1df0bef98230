"""What stands for the content of a folder, as a commit does for that of a repository.

A model is often trained on, and saved where it was: a name alone does not say which of the two is meant. Reading gigabytes to
tell would take as long as the work, so names, sizes and times of the files decide, as they do for `make` and `rsync`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

INDEX = "model_index.json"


def content_revision(folder: Path) -> str:
    """40 hexadecimal digits, others whenever a file of the pipeline in `folder` was written, added or removed.

    What lies beside the pipeline's own folders, such as README.md, does not count, nor do hidden files.
    """
    digest = hashlib.sha256()
    parts = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in (folder / INDEX, *(file for part in parts for file in sorted(part.rglob("*")))):
        if path.is_file() and not path.name.startswith("."):
            found = path.stat()
            digest.update(f"{path.relative_to(folder).as_posix()!r} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:40]
