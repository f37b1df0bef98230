"""Locks on files: one process at a time may work on a folder, and the system lets go of its lock when the process dies.

`filelock` knows how each system does that (`flock` where there is Unix, `LockFileEx` on Windows). A lock file stays where it is
and is always empty: what is locked is the file, its content says nothing. A file system without locks (some network drives)
locks nothing: then nobody else should work on the folder.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import lock_descriptor, unlock_descriptor

RETRY_SECONDS = 0.01
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK}  # what systems without locks say


def lock(path: Path, patience: float = 0.0, *, is_certain: bool = False) -> IO[str] | None:
    """Lock a file (made if there is none) until `unlock` or the end of this process; None if it stays taken for `patience`.

    Who opens the file twice is another one the second time, in the same process too.

    Args:
        is_certain: None also where there are no locks, and nobody can know whether it is taken.
    """
    end = time.monotonic() + patience
    file = open(path, "a", encoding="utf-8")
    try:
        while not _try(file, is_certain):
            if time.monotonic() >= end:
                file.close()
                return None
            time.sleep(RETRY_SECONDS)
    except BaseException:
        file.close()
        raise
    return file


def unlock(file: IO[str]) -> None:
    """Let go of a lock. Closing is not enough when the process was forked meanwhile and the child has the file open too."""
    try:
        if not file.closed:
            unlock_descriptor(file.fileno())
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    finally:
        file.close()


@contextmanager
def locked(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Lock a file for a while; yields whether that worked within `patience` seconds."""
    file = lock(path, patience)
    try:
        yield file is not None
    finally:
        if file is not None:
            unlock(file)


def _try(file: IO[str], is_certain: bool) -> bool:
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return not is_certain
        raise
