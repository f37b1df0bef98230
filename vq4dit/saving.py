"""Write a quantized pipeline to a folder: whole, or not at all, and never over something that is not ours.

What is quantized is written from memory. The other parts of the pipeline are copied as files from where the original lies, byte
for byte: in memory they may be in another type, and twice as large. `vq4dit.json` says how it was made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from vq4dit.config import QuantizationSettings, QuantMethod
from vq4dit.errors import FormatError
from vq4dit.files import check_free, whole_folder
from vq4dit.json_files import read_object
from vq4dit.origin import FILENAME, Origin, read_origin, versions, write_origin
from vq4dit.pipeline_files import CONFIGURATION, INDEX, part_files, pipeline_files, stays_inside, weight_files, without_variant


def save(
    pipeline: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    source: str | Path | None = None,
    origin: Origin | None = None,
    scratch: Path | None = None,
) -> None:
    """Write a quantized pipeline to `folder` (or where a link of that name leads): whole, or not at all.

    Args:
        overwrite: replace a result of ours that is there; never anything else.
        source: the original's folder. Parts that are not quantized are copied from it; without it they are written from
            memory, in the type they have there.
        origin: what `vq4dit.json` shall say; without it, as much as the model knows of itself.
        scratch: a folder on the same disk where it is written first, such as a job's, which cleans up after a process that was
            killed; by default the one around `folder`.

    Raises:
        ValueError: if the folder has no name.
        JobError: if the folder is not empty and `overwrite` is false, it holds anything but a result of ours, or the disk is
            full.
    """
    if not str(folder):
        raise ValueError("the folder to save to must have a name, got an empty one")
    advice = "run the same command with --resume" if scratch else "save it again"  # whoever has a scratch folder has a job
    with whole_folder(Path(folder).resolve(), overwrite, result_files, advice, scratch) as partial:
        _write_parts(pipeline, partial, max_shard_size, Path(source) if source else None)
        write_origin(partial, origin or _origin_of(pipeline))


def _write_parts(pipeline: Any, folder: Path, max_shard_size: str, source: Path | None) -> None:
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    copied = [name for name, part in parts.items() if source and _copy_part(part, source / name, folder / name, source)]
    if copied:
        for name in parts.keys() - set(copied):
            shards = {"max_shard_size": max_shard_size} if isinstance(parts[name], nn.Module) else {}
            parts[name].save_pretrained(folder / name, **shards)
        pipeline.save_config(folder)
        named = read_object(Path(source or folder) / INDEX)
        _change(folder / INDEX, lambda index: index | {name: named[name] for name in copied})
    else:
        pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    for path in folder.rglob("*.json"):
        if path.name in (INDEX, *CONFIGURATION) and path.parent.name not in copied:
            _change(path, _without_local_path)


def _copy_part(part: Any, source: Path, target: Path, root: Path) -> bool:
    """Copy the files of a part that is not quantized; False if it has to be written from memory.

    That is so for a part without safetensors, or one whose files are links to somewhere outside of the pipeline's folder: what
    they lead to may be no part of it.
    """
    names = part_files(source)
    is_ours = getattr(part, "quantization_method", None) == QuantMethod.VQ4DIT
    if is_ours or not names or (isinstance(part, nn.Module) and not weight_files(source)):
        return False
    if not all(stays_inside(source / name, root) for name in names):
        return False
    target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / without_variant(name))
    return True


def _change(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    before = read_object(path)
    if (after := change(before)) != before:
        path.write_text(json.dumps(after, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_local_path(values: dict[str, Any]) -> dict[str, Any]:
    """diffusers notes where a model was loaded from: a Hub id is worth keeping, a folder of this machine is not."""
    is_local = bool(values.get("_name_or_path")) and Path(values["_name_or_path"]).exists()
    return {name: value for name, value in values.items() if name != "_name_or_path" or not is_local}


def _origin_of(pipeline: Any) -> Origin:
    """What a quantized pipeline knows of how it was made, if nobody else says it."""
    transformer = getattr(pipeline, "transformer", None)
    if origin := getattr(transformer, "vq4dit_origin", None):  # it was made in this process
        return origin
    made = dict(getattr(transformer, "config", {})).get("quantization_config") or {}
    values = made if isinstance(made, dict) else made.to_dict()
    return Origin(settings={name: values[name] for name in ("bits", "recipe", "seed") if name in values}, versions=versions())


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise `JobError` if something would be lost by saving to `folder`: see `check_free`."""
    check_free(folder, overwrite, result_files)


def result_files(folder: Path) -> set[str] | None:
    """The names of the files of a quantized pipeline that we wrote; None if the folder is none of ours."""
    return None if _origin_of_result(folder) is None else {FILENAME, *pipeline_files(folder)}


def is_result(folder: Path, settings: QuantizationSettings, fingerprint: str = "") -> bool:
    """Whether `folder` already is what these settings make of the model with this fingerprint (of some model, without one).

    A process may be killed between saving and cleaning up.
    """
    origin = _origin_of_result(folder)
    if origin is None or not origin.fingerprint or origin.settings != settings.to_dict():
        return False
    return fingerprint in ("", origin.fingerprint)


def _origin_of_result(folder: Path) -> Origin | None:
    """How a result of ours was made; None if the folder holds something else."""
    try:
        origin = read_origin(folder)
        config = read_object(folder / "transformer" / "config.json")
        method = config["quantization_config"]["quant_method"]
    except (FormatError, OSError, TypeError, KeyError):
        return None
    return origin if origin.versions and method == "vq4dit" else None
