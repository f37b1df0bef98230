"""Files that are there whole or not at all, whatever kills the process, and places where something can be written.

What is written gets a random name in the same folder first (nobody else's, so nothing is in its way), is flushed, and takes its
place by one rename.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vq4dit.errors import JobError

TEMPORARY = re.compile(r"\.vq4dit-[0-9a-f]{16}\.partial")
WINDOWS = os.name == "nt"
FULL = {errno.ENOSPC, errno.EDQUOT}
FULL_WORDS = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")  # safetensors' errors have no number
FULL_PAGE = "the disk of this server is full: what is finished is kept, try again later or choose a smaller model"
SHOWN = 5  # names in a message


def temporary_name(folder: Path) -> Path:
    """A name in `folder` that nobody else has, short enough for every file system."""
    return folder / f".vq4dit-{secrets.token_hex(8)}.partial"


def amount(num_bytes: int | float) -> str:
    """Bytes in the unit that shows them: "812 bytes", "4.2 MB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    return (isinstance(error, OSError) and error.errno in FULL) or any(words in str(error) for words in FULL_WORDS)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system offers that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes, advice: str = "try again") -> None:
    """Write a file so that it is there whole or not at all: temporary name, fsync, rename.

    Args:
        advice: what to do after space was made.

    Raises:
        JobError: if the disk is full.
    """
    temporary = temporary_name(path.parent)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _rename(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if is_full(error):
            needed = amount(len(content))
            raise JobError(f"the disk is full: {path} needs {needed}. Free some space and {advice}", page=FULL_PAGE) from error
        raise


def _rename(temporary: Path, path: Path) -> None:
    """Put a file where it belongs. Windows refuses while somebody reads the one that is there, which takes a moment."""
    for seconds in (0.01, 0.1, 1.0) if WINDOWS else ():
        try:
            temporary.replace(path)
            return
        except PermissionError:
            time.sleep(seconds)
    temporary.replace(path)


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say of what the system refuses that it is `path` which cannot be used."""
    try:
        yield
    except OSError as error:
        raise JobError(f"{path} cannot be used ({error.strerror or error}): choose another output") from error


def check_place(path: Path) -> None:
    """Raise `JobError` unless something can be written under this (absolute) name: before the work, not after it.

    It is tried out where the path begins to exist, since permissions alone do not tell: disks are read-only, names too long.
    """
    if os.path.ismount(path):
        raise JobError(f"{path} is where a disk is mounted, and cannot be replaced as a whole: choose a folder in it")
    with told(path):
        place = next(folder for folder in path.parents if os.path.lexists(folder))
        deep = path / ("n" * 100) / ("n" * 100)  # what is written below it has a name too
        for name in (*(place / part for part in path.relative_to(place).parts), deep):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(name)
        probe = temporary_name(place)
        probe.mkdir()
        probe.rmdir()


def listed(names: list[str]) -> str:
    """Some of the names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
