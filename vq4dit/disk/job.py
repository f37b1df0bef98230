"""A job: a folder on disk with its settings and one file for every finished piece.

Quantizing is long, and processes die: leases end, people press Ctrl-C, machines lose power. So every finished piece (a
layer's codebook and candidates or its integers, a calibration checkpoint) is written at once, under a temporary name, flushed,
and renamed: a file that is there is whole. Whoever opens the folder again goes on after the last piece and ends in the same
bytes. Each piece is sealed with a checksum over its content, its name and its job, so what was damaged, or belongs elsewhere,
is noticed; and only what bears such a seal is ever deleted: other files in the folder are not ours.

    DIR.job/job.json                    settings and the fingerprint of the model's weights
    DIR.job/layers/NAME.safetensors     one clustered or fitted layer
    DIR.job/calibration.safetensors     `paper`: the newest checkpoint
    DIR.job/sensitivities.safetensors   `best`: how much errors in each layer's outputs matter
    DIR.job/sensitivities-of-steps.safetensors  `best`: and in which denoising step, where no tokens are seen
    DIR.job/sensitivities-of-weights.safetensors  `best`: and how much of that adds up over tokens
    DIR.job/bits.safetensors            `best`: how many bits each layer gets
    DIR.job/errors.safetensors          `best`: and what it is then expected to add to the output's error
    DIR.job/lock                        held by the process that works on the job
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vq4dit.config import QuantizationSettings, check_settings
from vq4dit.denoisers import as_one, denoisers_of
from vq4dit.disk.files import TEMPORARY, WINDOWS, listed, told, write_atomically
from vq4dit.disk.folders import sweep, unknown_names
from vq4dit.disk.json_files import read_object
from vq4dit.disk.locks import lock, unlock
from vq4dit.errors import FormatError, JobError

VERSION = 17  # of the pieces: raised when a recipe changes, so that no job goes on with half of each
ANEW = "what was kept of this work is damaged, or of another model or version: choose another seed, which begins anew"
MARK = "vq4dit"  # of a piece, among its metadata: its name and its seal


def fingerprint(pipeline: Any) -> str:
    """SHA-256 over all that a result depends on: the transformers' tensors and settings, the scheduler's, the labels."""
    scheduler, transformers = getattr(pipeline, "scheduler", None), denoisers_of(pipeline)
    settings = [_settings(part) for part in (scheduler, *transformers.values())]
    described = [type(scheduler).__name__, *settings, getattr(pipeline, "labels", {})]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    _update(digest, as_one(transformers).state_dict())
    return digest.hexdigest()


def _settings(part: Any) -> dict[str, Any]:
    """A part's configuration, without what diffusers notes for itself."""
    return {key: value for key, value in dict(getattr(part, "config", {})).items() if not key.startswith("_")}


def _update(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


class TimeBudget:
    """Seconds that may be spent, from now on; None is as long as it takes."""

    def __init__(self, seconds: float | None):
        self._end = None if seconds is None else time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        """Whether something that takes `seconds` still fits."""
        return self._end is None or time.monotonic() + seconds < self._end


class Job:
    """The folder of one quantization, locked while this object is open (use it in a `with`)."""

    def __init__(self, folder: Path, settings: QuantizationSettings, lock: IO[str], description: dict[str, Any]):
        self.folder, self.settings, self._lock, self._description = folder, settings, lock, description

    @classmethod
    def open(cls, folder: Path | str, settings: QuantizationSettings, pipeline: Any, *, resume: bool) -> Job:
        """Start a new job, or with `resume` go on with the one in `folder` (start one if there is none).

        Raises:
            JobError: if there is a job and `resume` is false, or it was started with other settings, another version of
                these files or another model, or another process works on it, or the folder holds anything but a job.
        """
        check_settings(settings)
        if getattr(pipeline, "transformer", None) is None:
            raise ValueError(f"a pipeline with a transformer is wanted, got a {type(pipeline).__name__}")
        folder = Path(folder).expanduser()
        check_job_folder(folder)
        path = folder / "job.json"
        with told(folder):
            (folder / "layers").mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)  # before anything is advised: of a running job's folder nothing may be deleted
        try:
            if path.exists() and not resume:
                raise JobError(f"{folder} holds an unfinished job: go on with it (--resume) or delete the folder")
            description = {"version": VERSION, "settings": settings.to_dict(), "fingerprint": fingerprint(pipeline)}
            job = cls(folder, settings, lock, description)
            if path.exists():
                _compare(_read_description(path), description, folder)
                job._delete(TEMPORARY.fullmatch)  # a process was killed while it wrote them
            else:
                job._delete()  # of a job whose description is gone
                write_atomically(path, json.dumps(description, indent=1, sort_keys=True).encode())
        except BaseException:
            unlock(lock)
            raise
        return job

    @property
    def fingerprint(self) -> str:
        """Of the model that is quantized here."""
        return self._description["fingerprint"]

    def has(self, piece: str) -> bool:
        """Whether a piece is finished.

        Raises:
            JobError: if something else has its name.
        """
        path = self._path(piece)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise JobError(f"{path} is damaged (it is a link or a folder): remove it and resume", page=ANEW)
        return path.exists()

    def read(self, piece: str) -> dict[str, Tensor]:
        """The tensors of a finished piece, on the CPU.

        Raises:
            JobError: if the file was damaged after it was written, or is another piece or one of another job.
        """
        path = self._path(piece)
        try:
            with safe_open(path, "pt") as file:
                said = _sealed(file.metadata())
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise JobError(f"{path} is damaged ({error}): delete this file and resume", page=ANEW) from error
        if said != (piece, self._seal(piece, tensors)):
            raise JobError(
                f"{path} is damaged, or belongs to another layer or another job (its checksum does not fit): delete this file "
                "and resume",
                page=ANEW,
            )
        return tensors

    def write(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        sealed = save(content, {MARK: json.dumps([piece, self._seal(piece, content)])})
        advice = "run the same command with --resume; finished pieces are kept"
        write_atomically(self._path(piece), sealed, advice)

    def close(self) -> None:
        unlock(self._lock)

    def remove(self) -> None:
        """Delete the job's own files, and the folder if nothing else is in it: the result is safe elsewhere.

        The description goes last, so that half a removal is still a job of ours.
        """
        self._delete()
        with suppress(OSError):  # somebody else's files are in it: they stay
            (self.folder / "layers").rmdir()
        (self.folder / "job.json").unlink()
        if WINDOWS:  # where open files cannot be deleted
            self.close()
        (self.folder / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
        self.close()

    def _delete(self, chosen: Callable[[str], Any] = bool) -> None:
        """Delete pieces and what was left half written: those with a chosen name. Of whole results, see `sweep`."""
        for folder in (self.folder / "layers", self.folder):
            for name in filter(chosen, _own_names(folder)):
                (folder / name).unlink()
        sweep(self.folder, is_alone=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, piece: str) -> Path:
        return self.folder / f"{piece}.safetensors"

    def _seal(self, piece: str, tensors: Mapping[str, Tensor]) -> str:
        """SHA-256 over this job's description, the piece's name and all that is in it."""
        digest = hashlib.sha256(json.dumps([self._description, piece], sort_keys=True).encode())
        _update(digest, tensors)
        return digest.hexdigest()


def check_job_folder(folder: Path) -> None:
    """Raise `JobError` unless a folder is missing, is a job of ours, or holds nothing but what such a job leaves behind."""
    with told(folder):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            raise JobError(f"{folder} is a link or a file, and a job needs a folder of its own: move it away")
        if not folder.exists():
            return
        for name, is_right in (("job.json", Path.is_file), ("lock", _is_empty_file), ("layers", Path.is_dir)):
            path = folder / name
            if path.is_symlink() or (path.exists() and not is_right(path)):
                raise JobError(f"{path} is none of a job's files (a link, or of another kind): move {folder} away")
        if (folder / "job.json").exists():
            _read_description(folder / "job.json")
            return
        ours = {f"layers/{name}" for name in _own_names(folder / "layers")} | _own_names(folder) | {"lock"}
        if unknown := [name for name in unknown_names(folder, ours) if name != "layers"]:
            raise JobError(
                f"{folder} is no job of ours: it has no job.json, and holds {listed(unknown)}. Quantizing would work in the "
                "folder of that name: move it away, or choose another output"
            )


def _is_empty_file(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _own_names(folder: Path) -> set[str]:
    """The names in a job's folder, or in its `layers`, of sealed pieces and of what was being written."""
    if folder.is_symlink() or not folder.is_dir():
        return set()
    found = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    return {path.name for path in found if TEMPORARY.fullmatch(path.name) or _is_piece(path)}


def _is_piece(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            piece, _ = _sealed(file.metadata())
    except (SafetensorError, OSError):
        return False
    return piece in (path.stem, f"layers/{path.stem}")


def _sealed(metadata: dict[str, str] | None) -> tuple[str, str]:
    """The piece's name and seal that a file says it has; empty if it says nothing."""
    try:
        piece, seal = json.loads((metadata or {}).get(MARK, ""))
    except (ValueError, TypeError, RecursionError):
        return "", ""
    return str(piece), str(seal)


def _lock(folder: Path) -> IO[str]:
    found = lock(folder / "lock")
    if found is None:
        raise JobError(f"another process is working on {folder}: wait for it, or stop it first")
    return found


def _read_description(path: Path) -> dict[str, Any]:
    """What a job says of itself.

    Raises:
        JobError: if it cannot be read, or is none of ours of this version.
    """
    try:
        found = read_object(path, "it is damaged")
    except (OSError, FormatError) as error:
        raise _no_job(path, str(error)) from error
    kinds = {"version": int, "settings": dict, "fingerprint": str}
    if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
        raise _no_job(path, "it describes no job, or is of another version of vq4dit")
    if found["version"] != VERSION:
        raise _no_job(path, "it is of another version of vq4dit")
    return found


def _no_job(path: Path, reason: str) -> JobError:
    return JobError(
        f"{path} cannot be gone on with ({reason}): if nothing in {path.parent} is yours, delete the folder and start again, "
        "or choose another output",
        page=ANEW,
    )


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    if found["fingerprint"] != wanted["fingerprint"]:
        raise JobError(
            f"{folder} was started with other weights, labels or another scheduler: resume with the same model, or delete it",
            page=ANEW,
        )
    if found["settings"] != wanted["settings"]:
        there, now = found["settings"], wanted["settings"]
        differing = [key for key in {**now, **there} if there.get(key) != now.get(key)]
        shown = ", ".join(f"{key}={there.get(key)!r} there, {now.get(key)!r} now" for key in differing)
        raise JobError(f"{folder} was started with other settings ({shown}): repeat those, or delete the folder")
