"""What we wrote into a folder: every file by its name, size and SHA-256, in `vq4dit.json`, which bears a checksum of itself.

A name does not tell whose a file is: somebody may have put weights of his own under one of ours, or edited a configuration.
So a folder that we write gets a record, and whatever does not fit it any more is no longer ours: it is not replaced, not
deleted and not published.

    {..., "files": {"vae/config.json": [812, "<SHA-256>"], ...}, "seal": "<SHA-256 of all the rest>"}
"""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vq4dit.disk.json_files import read_object
from vq4dit.errors import FormatError

RECORD = "vq4dit.json"
FILES, SEAL = "files", "seal"  # of the record
SETTLED_SECONDS = 2.0  # a file that changed just now may change again without another time stamp

Files = Mapping[str, tuple[int, str]]  # bytes and SHA-256, by the name below the folder
_CHECKSUMS: dict[tuple[int, ...], str] = {}  # of files that did not change since they were read


def write_record(folder: Path) -> None:
    """Add to a folder's `vq4dit.json` (made if there is none) what lies in the folder now."""
    path = folder / RECORD
    values = read_object(path) if path.exists() else {}
    found = (file for file in folder.rglob("*") if file.is_file() and file != path)
    files = {file.relative_to(folder).as_posix(): [file.stat().st_size, checksum(file)] for file in found}
    values = {key: value for key, value in values.items() if key != SEAL} | {FILES: files}
    path.write_bytes(_encoded(values | {SEAL: _seal(values)}))


def recorded(folder: Path) -> Files | None:
    """The files that we wrote into a folder; None if there is no record, or somebody changed it."""
    path = folder / RECORD
    try:
        if path.is_symlink():
            return None
        values = read_object(path)
        if path.read_bytes() != _encoded(values) or values.pop(SEAL, None) != _seal(values):
            return None
        return {_checked(name): (int(size), str(digest)) for name, (size, digest) in values[FILES].items()}
    except (OSError, FormatError, ValueError, TypeError, KeyError, AttributeError):
        return None


def has_record(folder: Path) -> bool:
    """Whether a folder says which files it has, though that may not fit any more. Earlier versions kept no record."""
    try:
        return FILES in read_object(folder / RECORD)
    except (OSError, FormatError):
        return False


def intact(folder: Path, files: Files) -> set[str]:
    """Of the recorded files those that are as they were written, and the record itself."""
    alike = alike_in_size(folder, files)
    return {name for name in alike if name == RECORD or checksum(folder / name) == files[name][1]}


def alike_in_size(folder: Path, files: Files) -> set[str]:
    """Of the recorded files those that may be as they were written: unread. No links, nor what lies behind one."""
    return {RECORD} | {name for name, (size, _) in files.items() if _size(folder, name) == size}


def is_own_file(folder: Path, name: str) -> bool:
    """Whether there is an ordinary file of this name below a folder, and neither it nor a folder on the way is a link."""
    return _size(folder, name) is not None


def checksum(path: Path) -> str:
    """SHA-256 of a file. One that is gigabytes large is read once by a process, as long as nobody touches it."""
    found = path.lstat()
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key not in _CHECKSUMS:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED_SECONDS:
            return digest
        _CHECKSUMS[key] = digest
    return _CHECKSUMS[key]


def _size(folder: Path, name: str) -> int | None:
    *parents, _ = PurePosixPath(name).parents
    try:
        found = (folder / name).lstat()
        if not stat.S_ISREG(found.st_mode) or any((folder / parent).is_symlink() for parent in parents):
            return None
    except OSError:
        return None
    return found.st_size


def _checked(name: str) -> str:
    """A stranger's record may name anything: only what lies below the folder counts.

    Raises:
        ValueError: if this is no such name.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or "\0" in name or path.as_posix() != name:
        raise ValueError(f"{name!r:.100} is no name below a folder")
    return name


def _encoded(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
