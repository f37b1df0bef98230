"""Write a quantized pipeline to a folder: whole, or not at all, and never over something that is not ours.

What is quantized is written from memory. The other parts of the pipeline are copied as files from where the original lies, byte
for byte: in memory they may be in another type, and twice as large. Or they are not copied but referenced, see
`references.py`. `vq4dit.json` says how it was made.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import nn

from vq4dit.config import QuantizationSettings, QuantMethod
from vq4dit.denoisers import denoisers_of
from vq4dit.disk.files import listed
from vq4dit.disk.folders import check_free, whole_folder
from vq4dit.disk.job import fingerprint
from vq4dit.disk.json_files import read_object
from vq4dit.disk.record import RECORD, Files, checksum, has_record, intact, recorded
from vq4dit.errors import FormatError, JobError
from vq4dit.pipelines.inventory import (
    CONFIGURATION,
    INDEX,
    PROCESSOR,
    SCHEDULER,
    is_of_pipeline,
    part_files,
    weight_files,
    without_variant,
)
from vq4dit.pipelines.provenance import Origin, read_origin, recorded_settings, versions, write_origin
from vq4dit.pipelines.references import COMPONENTS, Components, Reference, read_reference, reference_to

MAX_SHARD_SIZE = "5GB"
NOTING_A_PATH = (INDEX, *CONFIGURATION, *SCHEDULER, *PROCESSOR)  # of where something was loaded from


def save(
    pipeline: Any,
    folder: str | Path,
    *,
    overwrite: bool = False,
    max_shard_size: str = MAX_SHARD_SIZE,
    source: str | Path | None = None,
    origin: Origin | None = None,
    scratch: str | Path | None = None,
    components: Components = "copy",
) -> None:
    """Write a quantized pipeline to `folder` (or where a link of that name leads): whole, or not at all.

    Args:
        overwrite: replace a result of ours that is there, if it is as we wrote it; never anything else.
        source: the original's folder. Parts that are not quantized are copied from it; without it they are written from
            memory, in the type they have there.
        origin: what `vq4dit.json` shall say; without it, as much as the model knows of itself.
        scratch: a folder on the same disk where it is written first, such as a job's, which cleans up after a process that was
            killed; by default the one around `folder`.
        components: "reference" does not copy the parts with weights, but says where they are: in the repository and commit that
            `origin` names, of which `source` is the snapshot.

    Raises:
        ValueError: if the folder has no name, `source` is none, or this is no quantized pipeline.
        VQ4DiTError: if parts shall be referenced, and `origin` names no repository and commit.
        JobError: if the folder is not empty and `overwrite` is false, it holds anything but a result of ours as it was written,
            or the disk is full.
    """
    if not str(folder):
        raise ValueError("the folder to save to must have a name, got an empty one")
    _check_quantized(pipeline)
    target = Path(folder).expanduser().resolve()
    copied, work = (Path(path).expanduser() if path else None for path in (source, scratch))
    if copied and not copied.is_dir():
        raise ValueError(f"source must be the folder of the original, got {copied}")
    reference = _wanted_reference(pipeline, copied, origin, components)
    advice = "run the same command with --resume" if scratch else "save it again"  # whoever has a scratch folder has a job
    with whole_folder(target, overwrite, INDEX, advice, work) as partial:
        _write_parts(pipeline, partial, max_shard_size, copied, reference)
        write_origin(partial, origin or _origin_of(pipeline))


def _check_quantized(pipeline: Any) -> None:
    """Raise `ValueError` unless this is a pipeline, and a part of it is quantized."""
    parts = getattr(pipeline, "components", None)
    if not isinstance(parts, dict):
        raise ValueError(f"a quantized pipeline is wanted (not its transformer alone), got a {type(pipeline).__name__}")
    if not any(_is_ours(part) for part in parts.values()):
        raise ValueError("nothing in this pipeline is quantized: vq4dit.quantize it first, or call its save_pretrained")


def _is_ours(part: Any) -> bool:
    """Whether we quantized it, and it still is."""
    return getattr(part, "is_quantized", False) and getattr(part, "quantization_method", None) == QuantMethod.VQ4DIT


def _wanted_reference(pipeline: Any, source: Path | None, origin: Origin | None, components: str) -> Reference | None:
    if components not in COMPONENTS:
        raise ValueError(f"components must be one of {', '.join(COMPONENTS)}, got {components!r}")
    if components == "copy":
        return None
    if source is None:
        raise ValueError(
            'components="reference" needs source, the snapshot of the original, to know what is referenced; got none'
        )
    return reference_of(pipeline, source, origin or Origin())


def reference_of(pipeline: Any, source: Path, origin: Origin) -> Reference:
    """The reference to the parts with weights that would else be copied from the original's snapshot.

    Raises:
        VQ4DiTError: see `check_base`.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    others = parts.keys() - denoisers_of(pipeline).keys()
    lent = [name for name in others if _copied_names(parts[name], source / name, source)]
    return reference_to(origin.model, origin.revision, source, {name: type(parts[name]).__name__ for name in lent})


def _write_parts(
    pipeline: Any, folder: Path, max_shard_size: str, source: Path | None, reference: Reference | None = None
) -> None:
    lent = reference.parts if reference else []
    parts = {name: part for name, part in pipeline.components.items() if part is not None and name not in lent}
    copied = [name for name, part in parts.items() if source and _copy_part(part, source / name, folder / name, source)]
    if copied or lent:
        for name in parts.keys() - set(copied):
            _write_part(parts[name], folder / name, max_shard_size)
        pipeline.save_config(folder)
        named = read_object(Path(source or folder) / INDEX)
        referenced = reference.entry() if reference else {}
        _change(folder / INDEX, lambda index: index | {name: named[name] for name in (*copied, *lent)} | referenced)
    else:
        pipeline.save_pretrained(folder, max_shard_size=max_shard_size)
    _forget_local_paths(folder, copied)


def _write_part(part: Any, folder: Path, max_shard_size: str) -> None:
    """From memory."""
    part.save_pretrained(folder, **({"max_shard_size": max_shard_size} if isinstance(part, nn.Module) else {}))


def _copy_part(part: Any, source: Path, target: Path, root: Path) -> bool:
    """Copy the files of a part that is not quantized; False if it has to be written from memory."""
    names = _copied_names(part, source, root)
    if names:
        target.mkdir()
    for name in names:
        shutil.copyfile(source / name, target / without_variant(name))
    return bool(names)


def _copied_names(part: Any, source: Path, root: Path) -> list[str]:
    """The names of the files of a part that are copied.

    None are if it is quantized or has no safetensors, or if one of them is a link: what that leads to may be no part of the
    pipeline.
    """
    names = part_files(source, type(part).__name__)
    if _is_ours(part) or (isinstance(part, nn.Module) and not weight_files(source)):
        return []
    return names if all(is_of_pipeline(root, f"{source.name}/{name}") for name in names) else []


def _forget_local_paths(folder: Path, copied: Collection[str] = ()) -> None:
    for path in folder.rglob("*.json"):
        if path.name in NOTING_A_PATH and path.parent.name not in copied:
            _change(path, _without_local_path)


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
    ours = next(part for part in pipeline.components.values() if _is_ours(part))
    if origin := getattr(ours, "vq4dit_origin", None):  # it was made in this process
        return origin
    made = dict(ours.config).get("quantization_config") or {}
    values = made if isinstance(made, dict) else made.to_dict()
    return Origin(settings={name: values[name] for name in ("bits", "recipe", "seed") if name in values}, versions=versions())


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise `JobError` if something would be lost by saving to `folder`: see `check_free`."""
    check_free(folder, overwrite, INDEX)


def result_files(folder: Path) -> set[str] | None:
    """The names of the files of a quantized pipeline that are as we wrote them; None if the folder is none of ours."""
    files = recorded(folder)
    return None if files is None or INDEX not in files else intact(folder, files)


def is_result(folder: Path, settings: QuantizationSettings, fingerprint: str = "") -> bool:
    """Whether `folder` says that it is what these settings make of the model with this fingerprint (of some, without one)."""
    try:
        origin = read_origin(folder)
    except FormatError:
        return False
    if not origin.versions or not origin.fingerprint or origin.settings != recorded_settings(settings):
        return False
    return fingerprint in ("", origin.fingerprint) and (has_record(folder) or _is_packed(folder))


def is_finished(
    folder: Path,
    settings: QuantizationSettings,
    pipeline: Any,
    source: Path,
    overwrite: bool,
    reference: Reference | None = None,
) -> bool:
    """Whether `folder` already is, in every byte, what these settings make of a pipeline.

    A process may be killed between saving and cleaning up. Of what earlier versions made the bytes are not known.

    Args:
        source: the pipeline's folder, from which parts that are not quantized are copied.
        reference: to the parts that would not be copied.
        overwrite: a result that is another one, or was changed, is none. Without it:

    Raises:
        JobError: if it is damaged, or its other parts are no longer those of the pipeline.
    """
    if not is_result(folder, settings, fingerprint(pipeline)):
        return False
    if not has_record(folder):
        return True
    files = recorded(folder)
    changed = [RECORD] if files is None else sorted(files.keys() - intact(folder, files))
    other = [] if files is None or changed else _other_parts(folder, files, pipeline, source, reference)
    if changed and not overwrite:
        raise JobError(
            f"{folder} is the finished result of this command, but not as it was written: {listed(changed)} changed or is "
            "missing. Move the folder away and repeat the command, or choose another output"
        )
    if other and not overwrite:
        raise JobError(
            f"{folder} is finished, but of other parts than the model has now: {', '.join(other)} differs. Pass --overwrite to "
            "replace it, choose another output, or repeat the --components that it was made with"
        )
    return not (changed or other)


def _other_parts(folder: Path, files: Files, pipeline: Any, source: Path, reference: Reference | None) -> list[str]:
    """The parts, but for what is quantized, that saving the pipeline now would write otherwise than they are recorded."""
    quantized, lent = denoisers_of(pipeline), reference.parts if reference else []
    elsewhere = quantized.keys() | set(lent)
    parts = {name: part for name, part in pipeline.components.items() if part is not None and name not in elsewhere}
    recorded_reference = read_reference(read_object(folder / INDEX), str(folder / INDEX))
    differing = lent if reference and recorded_reference != reference else []
    gone = {name.split("/")[0] for name in files if "/" in name} - parts.keys() - quantized.keys()
    for name, part in parts.items():
        there = {file: digest for file, (_, digest) in files.items() if file.startswith(f"{name}/")}
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary) / name
            if copied := _copied_names(part, source / name, source):
                now = {f"{name}/{without_variant(file)}": checksum((source / name / file).resolve()) for file in copied}
            else:
                _write_part(part, work, MAX_SHARD_SIZE)
                _forget_local_paths(work)
                written = [path for path in work.rglob("*") if path.is_file()]
                now = {path.relative_to(temporary).as_posix(): checksum(path) for path in written}
        if now != there:
            differing.append(name)
    return sorted({*differing, *gone})


def _is_packed(folder: Path) -> bool:
    try:
        return read_object(folder / "transformer" / "config.json")["quantization_config"]["quant_method"] == QuantMethod.VQ4DIT
    except (FormatError, OSError, TypeError, KeyError):
        return False
