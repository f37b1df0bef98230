"""What is published of a folder: the files that we wrote into it, as we wrote them, the card, and what is behind its figures.

Everything else that lies there belongs to whoever put it there, and so does what a link leads to: a name is no reason to show
a file to the public. A result of an earlier version has no record; of it, what the index and configurations name is taken.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vq4dit.disk.files import listed
from vq4dit.disk.record import RECORD, intact, is_own_file, recorded
from vq4dit.errors import HubError
from vq4dit.pipelines.inventory import is_of_pipeline, pipeline_files
from vq4dit.pipelines.load import check_files, read_json


@contextmanager
def staged(folder: Path, card: str, extras: Mapping[str, Path]) -> Iterator[Path]:
    """A temporary folder with exactly what will be published: links to the model's files, and copies of the small ones.

    Raises:
        HubError: if one of them is missing, is a link, or was changed since it was written.
    """
    read_json(str(folder), "model_index.json")
    check_files(folder)
    names = _published(folder)
    if missing := [f"{path} (for {place})" for place, path in extras.items() if not is_own_file(path.parent, path.name)]:
        raise HubError(
            f"{listed(missing)} is missing, or is a link, which is not published: compare again, and name what that writes",
            "card",
        )
    with tempfile.TemporaryDirectory() as name:
        stage = Path(name).resolve()
        for place in names:
            (stage / place).parent.mkdir(parents=True, exist_ok=True)
            try:
                (stage / place).symlink_to((folder / place).resolve())
            except OSError:  # Windows lets only some people make links
                shutil.copyfile(folder / place, stage / place)
        for place, path in extras.items():
            shutil.copyfile(path, stage / place)
        (stage / "README.md").write_text(card, encoding="utf-8")
        yield stage


def _published(folder: Path) -> list[str]:
    """The names of the model's files."""
    files = recorded(folder)
    if files is None:
        names = pipeline_files(folder) + ([RECORD] if os.path.lexists(folder / RECORD) else [])
    else:
        names = [*files, RECORD]
    there = [name for name in names if (folder / name).is_file()]
    if strange := [name for name in there if not is_of_pipeline(folder, name)]:
        raise HubError(
            f"{folder / strange[0]} is a link to a file outside of the model's folder, or to one that is no part of the model, "
            "and such are not published: put a copy of the file in its place",
            "card",
        )
    changed = set(names) - (set(there) if files is None else intact(folder, files))
    if changed:
        raise HubError(
            f"{folder}: {listed(sorted(changed))} is missing, or was changed since the model was quantized, and only what was "
            "made is published. Quantize again, or load the pipeline and `vq4dit.save` it to another folder",
            "checksum",
        )
    return names
