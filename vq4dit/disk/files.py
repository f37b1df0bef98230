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


def full_words(path: Path) -> str:
    """What is used up where `path` lies: a disk counts files as well as bytes."""
    place = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    with suppress(OSError, AttributeError):  # AttributeError: Windows
        disk = os.statvfs(place)
        if disk.f_files and not disk.f_favail and disk.f_bavail:
            return "the disk can hold no more files (its inodes are used up)"
    return "the disk is full"


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
        JobError: if the disk is full. OSError: what else the system says, with the file's own name.
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
            raise JobError(
                f"{full_words(path)}: {path} needs {needed}. Free some space and {advice}", page=FULL_PAGE
            ) from error
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # nobody knows the other name


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


def check_place(path: Path, replaced: bool = True) -> None:
    """Raise `JobError` unless something can be written under this (absolute) name: before the work, not after it.

    It is tried out where the path begins to exist, since permissions alone do not tell: disks are read-only, names too long.

    Args:
        replaced: what is there will be; without it, something will be moved from there to the folder around it.
    """
    if os.path.ismount(path):
        raise JobError(f"{path} is where a disk is mounted, and cannot be replaced as a whole: choose a folder in it")
    with told(path):
        place = next(folder for folder in path.parents if os.path.lexists(folder))
        deep = path / ("n" * 100) / ("n" * 100)  # what is written below it has a name too
        for name in (*(place / part for part in path.relative_to(place).parts), deep):
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(name)
        probe, moved = temporary_name(path if path.is_dir() and not replaced else place), temporary_name(place)
        probe.mkdir()
        try:
            probe.rename(moved)  # not every folder in which one can write lets names be changed
            probe = moved
            if replaced and os.path.lexists(path):
                _check_moves(path, moved)
        finally:
            probe.rmdir()


def _check_moves(path: Path, probe: Path) -> None:
    """Raise `JobError` unless what is at `path` could be moved: not another user's, or of an overlay's lower layer.

    It is asked to take the place of a folder that is not empty, `probe`. No system does that, and a system that could not move
    it says that instead.
    """
    (probe / "filled").mkdir()
    try:
        path.rename(probe)
        probe.rename(path)  # a system that does it nevertheless
        probe.mkdir()
    except OSError as error:
        is_empty = path.is_dir() and not any(path.iterdir())  # then it need not move
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR} | ({errno.EXDEV} if is_empty else set()):
            raise JobError(f"{path} cannot be replaced ({error.strerror or error}): choose another output") from error
    finally:
        with suppress(OSError):
            (probe / "filled").rmdir()


def listed(names: list[str]) -> str:
    """Some of the names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
