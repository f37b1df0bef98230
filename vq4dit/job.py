"""A job: a folder on disk with its settings and one file for every finished piece.

Quantizing is long, and processes die: leases end, people press Ctrl-C, machines lose power. So every finished piece (a
layer's codebook and candidates or its integers, a calibration checkpoint) is written at once, under a temporary name, flushed,
and renamed: a file that is there is whole. Whoever opens the folder again goes on after the last piece and ends in the same
bytes.

    DIR.job/job.json                    settings and the fingerprint of the model's weights
    DIR.job/layers/NAME.safetensors     one clustered or fitted layer
    DIR.job/calibration.safetensors     `paper`: the newest checkpoint
    DIR.job/sensitivities.safetensors   `best`: how much errors in each layer's outputs matter
    DIR.job/sensitivities-of-steps.safetensors  `best`: and in which denoising step, where no tokens are seen
    DIR.job/bits.safetensors            `best`: how many bits each layer gets
    DIR.job/lock                        held by the process that works on the job
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from vq4dit.config import QuantizationSettings
from vq4dit.errors import FormatError, JobError
from vq4dit.json_files import read_object, shown

VERSION = 9  # of the pieces: raised when a recipe changes, so that no job goes on with half of each


def fingerprint(pipeline: Any) -> str:
    """SHA-256 over all that a result depends on: the transformer's tensors, the scheduler's settings, the labels."""
    scheduler = getattr(pipeline, "scheduler", None)
    settings = {key: value for key, value in dict(getattr(scheduler, "config", {})).items() if not key.startswith("_")}
    described = [type(scheduler).__name__, settings, getattr(pipeline, "labels", {})]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(pipeline.transformer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system offers that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary name, fsync, rename.

    Raises:
        JobError: if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.partial")  # nobody else's
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise JobError(
                f"the disk is full: {path} needs {len(content) / 1e6:.1f} MB. Free some space and run the same command with "
                "--resume; finished pieces are kept"
            ) from error
        raise


class TimeBudget:
    """Seconds that may be spent, from now on; None is as long as it takes."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        """Whether something that takes `seconds` still fits."""
        return self._end is None or time.monotonic() + seconds < self._end


class Job:
    """The folder of one quantization, locked while this object is open (use it in a `with`)."""

    def __init__(self, folder: Path, settings: QuantizationSettings, lock: IO[str]):
        self.folder, self.settings, self._lock = folder, settings, lock

    @classmethod
    def open(cls, folder: Path, settings: QuantizationSettings, pipeline: Any, *, resume: bool) -> Job:
        """Start a new job, or with `resume` go on with the one in `folder` (start one if there is none).

        Raises:
            JobError: if there is a job and `resume` is false, or it was started with other settings, another version of
                these files or another model, or another process works on it.
        """
        description = {"version": VERSION, "settings": settings.to_dict(), "fingerprint": fingerprint(pipeline)}
        path = folder / "job.json"
        if path.exists() and not resume:
            raise JobError(f"{folder} holds an unfinished job: go on with it (--resume) or delete the folder")
        (folder / "layers").mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        job = cls(folder, settings, lock)
        try:
            if path.exists():
                _compare(_read_description(path), description, folder)
            else:
                job._clear()  # pieces without a description are left over from a removal that was interrupted
                write_atomically(path, json.dumps(description, indent=1, sort_keys=True).encode())
        except BaseException:
            job.close()
            raise
        return job

    def has(self, piece: str) -> bool:
        return self._path(piece).exists()

    def read(self, piece: str) -> dict[str, Tensor]:
        """The tensors of a finished piece, on the CPU.

        Raises:
            JobError: if the file was damaged after it was written.
        """
        try:
            return load_file(self._path(piece))
        except SafetensorError as error:
            raise JobError(f"{self._path(piece)} is damaged ({error}): delete this file and resume") from error

    def write(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        write_atomically(self._path(piece), save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Delete the folder: the result is safe elsewhere."""
        (self.folder / "job.json").unlink()  # first, so that half a removal is no job
        shutil.rmtree(self.folder)
        self.close()

    def _clear(self) -> None:
        for piece in self.folder.rglob("*.safetensors"):
            piece.unlink()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, piece: str) -> Path:
        return self.folder / f"{piece}.safetensors"


def _lock(folder: Path) -> IO[str]:
    lock = open(folder / "lock", "w")
    if os.name != "posix":  # no advisory locks: nobody else should work on the folder
        return lock
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise JobError(f"another process is working on {folder}: wait for it, or stop it first") from error
    return lock


def _read_description(path: Path) -> dict:
    try:
        return read_object(path, "delete the folder and start again")
    except FormatError as error:
        raise JobError(str(error)) from error


def _compare(found: dict, wanted: dict, folder: Path) -> None:
    if found.get("version") != wanted["version"] or not wanted.keys() <= found.keys():
        raise JobError(f"{folder} was written by another version of vq4dit: delete the folder and start again")
    if found["fingerprint"] != wanted["fingerprint"]:
        raise JobError(
            f"{folder} was started with other weights, labels or another scheduler: resume with the same model, or delete it"
        )
    if not isinstance(found["settings"], dict):
        raise JobError(
            f"{folder / 'job.json'} is damaged (settings is {shown(found['settings'])}): delete the folder, start again"
        )
    if found["settings"] != wanted["settings"]:
        differing = [key for key, value in wanted["settings"].items() if found["settings"].get(key) != value]
        told = ", ".join(f"{key}={found['settings'].get(key)!r} there, {wanted['settings'][key]!r} now" for key in differing)
        raise JobError(f"{folder} was started with other settings ({told}): repeat those, or delete the folder")
