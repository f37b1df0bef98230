"""How much lies in a folder, and whether the disk has room for more: asked before the work."""

import os
import shutil
from pathlib import Path

from vq4dit.disk.files import amount
from vq4dit.errors import JobError


def folder_bytes(folder: Path) -> int:
    """What the files of a folder need; those that vanish meanwhile do not count."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(stat.st_size for path in paths if (stat := stat_of(path)))


def stat_of(path: Path) -> os.stat_result | None:
    """None if it is not there any more."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def check_space(folder: Path, needed: int) -> None:
    """Raise `JobError` unless the disk of `folder` (which need not be there yet) has `needed` bytes left, and a tenth more."""
    free = shutil.disk_usage(next(place for place in (folder, *folder.resolve().parents) if place.exists())).free
    if free < 1.1 * needed:
        raise JobError(
            f"the disk has {amount(free)} left and this needs {amount(1.1 * needed)}: remove old results or choose a smaller "
            "model"
        )
