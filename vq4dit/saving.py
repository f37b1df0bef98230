"""Write a quantized pipeline to a folder: whole, or not at all, and never over something that is not ours."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vq4dit.config import QuantizationSettings
from vq4dit.errors import FormatError, JobError
from vq4dit.job import sync_folder
from vq4dit.json_files import read_object


def save(pipeline: Any, folder: Path, *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
    """Write a quantized pipeline to `folder`: whole, or not at all.

    Raises:
        JobError: if the folder is not empty and `overwrite` is false, or the disk is full.
    """
    check_output(folder, overwrite)
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    if folder.exists() and any(folder.iterdir()):
        shutil.rmtree(previous, ignore_errors=True)
    elif previous.exists():  # it was killed between the two renames below: this is all there is
        previous.rename(folder)
    try:
        pipeline.save_pretrained(partial, max_shard_size=max_shard_size)
        for path in sorted(partial.rglob("*")):
            if path.suffix == ".json":
                _forget_local_paths(path)
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
    except BaseException as error:  # safetensors reports a full disk as an error of its own
        shutil.rmtree(partial, ignore_errors=True)
        if "No space left" in str(error) or "os error 28" in str(error):
            raise JobError(f"the disk is full: {folder} could not be written. Free some space and use --resume") from error
        raise
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _forget_local_paths(path: Path) -> None:
    """diffusers notes where a model was loaded from: a Hub id is worth keeping, a folder of this machine is not."""
    values = json.loads(path.read_text())
    if (origin := values.get("_name_or_path")) and Path(origin).exists():
        del values["_name_or_path"]
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def check_output(folder: Path, overwrite: bool, contains: str = "model_index.json") -> None:
    """Raise `JobError` if something would be lost by writing to `folder`.

    Even with `overwrite` only a folder of the same kind is replaced: one that contains the file named `contains`.
    """
    if folder.is_file():
        raise JobError(f"{folder} is a file: choose another output")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise JobError(f"{folder} is not empty: choose another output, or pass --overwrite to replace it")
    if not (folder / contains).is_file():
        raise JobError(f"{folder} has no {contains}, so it is none of our results and is not replaced: choose another output")


def is_result(folder: Path, settings: QuantizationSettings) -> bool:
    """Whether `folder` already is what these settings make: a process may be killed between saving and cleaning up."""
    path = folder / "transformer" / "config.json"
    try:
        made = read_object(path).get("quantization_config") or {} if path.is_file() else {}
    except FormatError:  # whatever it is, we did not write it
        return False
    wanted = {"quant_method": "vq4dit", "bits": settings.bits, "recipe": settings.recipe, "seed": settings.seed}
    return wanted.items() <= made.items()
