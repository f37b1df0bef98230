"""Folders that are there whole or not at all, whatever kills the process, and never at the cost of what is not ours.

A folder is written inside of a hidden one, which a lock marks as somebody's work, and takes its place by one rename:

    .vq4dit-<random>.partial/lock     held by the process that writes; the system lets go of it when that process dies
    .vq4dit-<random>.partial/target   the path where the folder belongs
    .vq4dit-<random>.partial/new/     what is being written, by nobody else
    .vq4dit-<random>.partial/old/     what was finished and is about to be swapped; after that, what it replaced

Only a folder with our record (`vq4dit/disk/record.py`) is replaced, and only if nothing else lies in it. Somebody may put a
file into it at the last moment: so of `old` nothing is deleted but what its own record names, and the rest is kept and told of.
A process that is killed leaves the old folder or the new one, and a hidden one that the next run tidies away. Links are
never followed.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from vq4dit.disk.files import FULL_PAGE, TEMPORARY, WINDOWS, full_words, is_full, listed, sync_folder, temporary_name, told
from vq4dit.disk.locks import lock, unlock
from vq4dit.disk.record import RECORD, Files, alike_in_size, has_record, intact, recorded, write_record
from vq4dit.errors import JobError, LeftBehind

LOCK, TARGET, NEW, OLD = "lock", "target", "new", "old"
YOUNG_SECONDS = 60.0


@contextmanager
def whole_folder(
    folder: Path, overwrite: bool, mark: str, advice: str = "try again", scratch: Path | None = None
) -> Iterator[Path]:
    """A new folder to write into, which gets a record and takes the place of `folder` (no link) at the end.

    On an error it is gone again; where only the last step fails, what is finished is kept under another name. What is found
    that a killed process left is tidied away first.

    Args:
        mark: a file that folders of this kind have, and those of other kinds have not.
        advice: what to do after space was made.
        scratch: a folder on the same disk for what is not finished; by default the one around `folder`.

    Raises:
        JobError: if something would be lost (see `check_free`), or the disk is full.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for place in {folder.parent, scratch or folder.parent}:
        sweep(place)
    check_free(folder, overwrite, mark)
    work, held = temporary_name(scratch or folder.parent), None
    kept: Path | None = None
    try:
        with _told_of(folder, work / NEW, advice):
            work.mkdir()
            held = lock(work / LOCK)
            (work / TARGET).write_bytes(os.fsencode(os.path.abspath(folder)))
            (work / NEW).mkdir()
            yield work / NEW
            write_record(work / NEW)
            _settle(work / NEW)
        try:
            check_free(folder, overwrite, mark)  # once more: writing took its time
            _take_place(work, folder)
        except (OSError, JobError) as error:
            kept = _put_aside(work, folder)
            why = getattr(error, "strerror", None) or error
            raise JobError(
                f"all is done, but it cannot be put at {folder} ({why}). What was made is whole and lies in {kept}: move it to "
                "where you want it"
            ) from error
        sync_folder(folder.parent)
    finally:
        if kept is None or work not in kept.parents:
            _tidy(work, folder, held)
        elif held is not None:
            unlock(held)


@contextmanager
def _told_of(folder: Path, partial: Path, advice: str) -> Iterator[None]:
    """What fails while a folder is written is told of the folder: nobody knows where it is written."""
    try:
        yield
    except Exception as error:  # for a full disk every library has its own
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


def _put_aside(work: Path, folder: Path) -> Path:
    """Give a finished folder a name that people see, beside the one that it should have; returns where it is now."""
    finished = next(path for path in (work / NEW, work / OLD) if path.exists())
    aside = f"{folder.name[:50]}-finished-{secrets.token_hex(4)}"
    for place in (folder.with_name(aside), work.with_name(aside)):
        with suppress(OSError):
            finished.rename(place)
            return place
    with suppress(OSError):
        (work / LOCK).unlink()  # without it nobody tidies it away
    return finished


def check_free(folder: Path, overwrite: bool, mark: str) -> None:
    """Raise `JobError` if something would be lost by writing to `folder`.

    Even with `overwrite` only a folder of ours of the same kind (one with the file `mark`) is replaced, and only if all files
    in it are as we wrote them.
    """
    with told(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            raise JobError(f"{folder} is a file: choose another output")
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not overwrite:
            raise JobError(f"{folder} is not empty: choose another output, or pass --overwrite to replace it")
        files = recorded(folder)
        if files is None and (has_record(folder) or (folder / mark).exists() and (folder / RECORD).exists()):
            raise JobError(
                f"{folder} is none of our results that may be replaced: its {RECORD} was changed, or is of an earlier version, "
                "and does not tell which files are ours. Move the folder away, or choose another output"
            )
        if files is None or mark not in files:
            raise JobError(f"{folder} is none of our results and is not replaced: choose another output")
        if foreign := foreign_names(folder, files):
            told_names = [f"{name} (changed since it was written)" if name in files else name for name in foreign]
            raise JobError(
                f"{folder} holds what is not ours and would be lost: {listed(told_names)}. Move it away, or choose another "
                "output"
            )


def foreign_names(folder: Path, files: Files) -> list[str]:
    """What lies below a folder and is not what its record says. Files are read only if their names and sizes fit."""
    for looked_at in (alike_in_size, intact):
        if foreign := unknown_names(folder, looked_at(folder, files), files):
            return foreign
    return []


def unknown_names(folder: Path, known: set[str], named: Collection[str] = ()) -> list[str]:
    """What lies below a folder besides the known files: other files, folders of none of them, and every link.

    Args:
        named: files that may be missing; their folders are known.
    """
    parents = {parent.as_posix() for name in (*known, *named) for parent in Path(name).parents}
    return sorted(
        name for name, path in _entries(folder) if path.is_symlink() or name not in (parents if path.is_dir() else known)
    )


def remove_recorded(folder: Path) -> list[str]:
    """Delete what is as we wrote it below a folder, then the folders that are empty after that, itself too.

    The record goes last, so that half a removal can still be gone on with.

    Returns:
        The names of what stays: what is not ours, and what the system does not let us delete.
    """
    files = recorded(folder)
    known = set() if files is None else intact(folder, files)
    for name, path in sorted(_entries(folder), reverse=True):  # what lies in a folder before the folder
        with suppress(OSError):  # it is among the names that stay
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif name in known - {RECORD}:
                path.unlink()
    stays = sorted(name for name, path in _entries(folder) if path.is_symlink() or not path.is_dir())
    with suppress(OSError):
        if known.intersection(stays) == {RECORD}:
            (folder / RECORD).unlink()
            stays.remove(RECORD)
        folder.rmdir()
    return stays


def sweep(place: Path, *, is_alone: bool = False) -> None:
    """Tidy away what killed processes left in a folder.

    That is what lies behind a lock that nobody holds any more. What else has such a name is told of and left (`LeftBehind`).

    Args:
        is_alone: nobody else writes there. Otherwise what is young may be somebody's who is just beginning.
    """
    found: list[Path] = []
    with suppress(OSError):  # who may not look there may still write there
        found = sorted(path for path in place.iterdir() if TEMPORARY.fullmatch(path.name))
    for work in found:
        with suppress(OSError):  # its process was just about to leave, or it is another user's
            may_begin = not is_alone and time.time() - work.lstat().st_mtime < YOUNG_SECONDS
            is_folder = work.is_dir() and not work.is_symlink()
            if may_begin and not (is_folder and any((work / name).exists() for name in (NEW, OLD))):
                continue
            if is_folder and not any(work.iterdir()):
                work.rmdir()
            elif not is_folder or not (work / LOCK).is_file():
                _tell(f"{work} seems to be left by a run that was killed: delete it if no other is at work there")
            elif (held := lock(work / LOCK, is_certain=True)) is not None:
                target = (work / TARGET).read_bytes() if (work / TARGET).exists() else b""  # it had not begun yet
                _tidy(work, Path(os.fsdecode(target)), held)


def _tidy(work: Path, target: Path, held: IO[str] | None) -> None:
    """Delete what is ours in a hidden folder. What is not goes beside the target, and that is told."""
    new, old = work / NEW, work / OLD
    try:
        if old.exists() and not os.path.lexists(target):  # it was killed between two renames
            old.rename(target)
        elif old.exists() and (stays := remove_recorded(old)):
            _keep(old, target, stays)
        if new.exists():
            shutil.rmtree(new)
        for name in (TARGET, LOCK):
            if name == LOCK and held is not None and WINDOWS:  # where open files cannot be deleted
                unlock(held)
            (work / name).unlink(missing_ok=True)
        work.rmdir()
    except FileNotFoundError:  # it was not made yet
        pass
    except OSError as error:
        _tell(f"{work} could not be deleted ({error.strerror or error}): delete it")
    finally:
        if held is not None:
            unlock(held)


def _keep(old: Path, target: Path, stays: list[str]) -> None:
    """Give what stays of a replaced folder a name that can be seen."""
    kept = target.with_name(f"vq4dit-kept-{old.parent.name.split('-')[1][:8]}")
    old.rename(kept)
    _tell(
        f"{target} was replaced, and what was in it and is not ours, or could not be deleted, is now in {kept}: "
        f"{listed(stays)}. Move it to where it belongs"
    )


def _tell(text: str) -> None:
    warnings.warn(LeftBehind(text), stacklevel=2)


def _settle(folder: Path) -> None:
    """Flush a whole folder to disk. Its files get the rights that new files of this process have: some libraries give fewer."""
    rights = folder.stat().st_mode & 0o666
    for _, path in _entries(folder):
        if path.is_dir():
            sync_folder(path)
            continue
        if not WINDOWS:
            path.chmod(rights)
        with open(path, "rb+" if WINDOWS else "rb") as file:  # Windows flushes what may be written
            os.fsync(file.fileno())
    sync_folder(folder)


def _take_place(work: Path, folder: Path) -> None:
    """Put a finished folder where another is, which then is `old` (nothing is, if there was nothing in it)."""
    new, old = work / NEW, work / OLD
    if not folder.exists() or not any(folder.iterdir()):
        if WINDOWS and folder.exists():  # elsewhere an empty folder is replaced in the same step
            folder.rmdir()
        new.rename(folder)
        return
    new.rename(old)
    if not _exchange(old, folder):
        old.rename(new)
        folder.rename(old)
        new.rename(folder)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, so that no moment is without a result. False where the system has no such step."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return swap is not None and swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Everything below a folder, by its name relative to it. Links are listed and not followed."""
    for parent, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(parent, entry)
            yield path.relative_to(folder).as_posix(), path
