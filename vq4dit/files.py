"""Files and folders that are there whole or not at all, whatever kills the process, and never at the cost of what is not ours.

What is written gets a random name in the same folder first (nobody else's, so nothing is in its way), is flushed, and takes its
place by one rename. A folder is replaced only if it is one of ours, and if nothing else lies in it: each kind of folder says
which of its files we wrote (`Known`), and only those are ever deleted. Links are never followed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vq4dit.errors import JobError

TEMPORARY = re.compile(r"\.vq4dit-[0-9a-f]{16}\.partial")
WINDOWS = os.name == "nt"
FULL = {errno.ENOSPC, errno.EDQUOT}
FULL_WORDS = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")  # safetensors' errors have no number
FULL_PAGE = "the disk of this server is full: what is finished is kept, try again later or choose a smaller model"
SHOWN = 5  # names in a message

# The names below a folder of the files that we wrote; None if the folder is not one of ours.
Known = Callable[[Path], set[str] | None]


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


def check_free(folder: Path, overwrite: bool, known: Known) -> None:
    """Raise `JobError` if something would be lost by writing to `folder`.

    Even with `overwrite` only a folder of ours is replaced, and only if all files in it are known.
    """
    with told(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            raise JobError(f"{folder} is a file: choose another output")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not overwrite:
            raise JobError(f"{folder} is not empty: choose another output, or pass --overwrite to replace it")
        ours = known(folder)
        if ours is None:
            raise JobError(f"{folder} is none of our results and is not replaced: choose another output")
        if unknown := unknown_names(folder, ours):
            raise JobError(
                f"{folder} holds what is not ours and would be lost: {listed(unknown)}. Move it away, or choose another output"
            )


def listed(names: list[str]) -> str:
    """Some of the names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def unknown_names(folder: Path, known: set[str]) -> list[str]:
    """What lies below a folder besides the known files: other files, folders without a known file, and every link."""
    parents = {parent.as_posix() for name in known for parent in Path(name).parents}
    return sorted(
        name for name, path in _entries(folder) if path.is_symlink() or name not in (parents if path.is_dir() else known)
    )


def remove_known(folder: Path, known: set[str]) -> None:
    """Delete the known files below a folder, then the folders that are empty after that, itself too. The rest stays."""
    for name, path in sorted(_entries(folder), reverse=True):  # what lies in a folder before the folder
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif name in known:
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder, by its name relative to it. Links are listed and not followed."""
    for parent, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(parent, entry)
            yield path.relative_to(folder).as_posix(), path


@contextmanager
def whole_folder(
    folder: Path, overwrite: bool, known: Known, advice: str = "try again", scratch: Path | None = None
) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` (no link) at the end; on an error it is gone again.

    A process that is killed leaves the old folder or the new one, and perhaps a hidden `.vq4dit-*.partial` in `scratch`. Where
    only the last step fails, what is finished is kept under another name.

    Args:
        advice: what to do after space was made.
        scratch: a folder on the same disk for what is not finished; by default the one around `folder`.

    Raises:
        JobError: if something would be lost (see `check_free`), or the disk is full.
    """
    check_free(folder, overwrite, known)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary_name(scratch or folder.parent)
    try:
        partial.mkdir()
        yield partial
        _sync_all(partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # nobody else knows its name
        if is_full(error):
            told_where = f"{full_words(folder)}: {folder} could not be written. Free some space and {advice}"
            raise JobError(told_where, page=FULL_PAGE) from error
        if isinstance(error, JobError):
            shown = (text.replace(str(partial), str(folder)) for text in (str(error), error.page))
            raise JobError(next(shown), page=next(shown)) from error
        if isinstance(error, SafetensorError) or (isinstance(error, OSError) and str(partial) in str(error)):
            reason = str(error).replace(str(partial), str(folder))
            raise JobError(f"{folder} could not be written ({reason}): mend that and {advice}") from error
        raise
    try:
        check_free(folder, overwrite, known)  # once more: writing took its time
        previous = _take_place(partial, folder)
    except (OSError, JobError) as error:
        kept = _put_aside(partial, folder)
        why = getattr(error, "strerror", None) or error
        raise JobError(
            f"all is done, but it cannot be put at {folder} ({why}). What was made is whole and lies in {kept}: move it to "
            "where you want it"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    if previous is not None:
        remove_known(previous, known(previous) or set())


def _put_aside(partial: Path, folder: Path) -> Path:
    """Give a finished folder a name that people see, beside the one that it should have; returns where it is now."""
    aside = folder.with_name(f"{folder.name[:50]}-finished-{secrets.token_hex(4)}")
    try:
        partial.rename(aside)
    except OSError:
        return partial
    return aside


def _sync_all(folder: Path) -> None:
    for _, path in _entries(folder):
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb+" if WINDOWS else "rb") as file:  # Windows flushes what may be written
                os.fsync(file.fileno())
    sync_folder(folder)


def _take_place(partial: Path, folder: Path) -> Path | None:
    """Put a finished folder where another is; returns where that one is now (None if there was nothing in it)."""
    if not folder.exists() or not any(folder.iterdir()):
        if WINDOWS and folder.exists():  # elsewhere an empty folder is replaced in the same step
            folder.rmdir()
        partial.rename(folder)
        return None
    if _exchange(partial, folder):
        return partial
    previous = temporary_name(folder.parent)
    folder.rename(previous)
    try:
        partial.rename(folder)
    except BaseException:
        previous.rename(folder)
        raise
    return previous


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that no moment is without a result. False where the system has no such step."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
