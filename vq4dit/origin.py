"""Where a quantized model comes from: `vq4dit.json` beside its weights, written when it is made, read when it is published.

    {"base": {"model": "facebook/DiT-XL-2-256", "revision": "<commit>"}, "settings": {...}, "versions": {...}}

A base that was a folder has no Hub id: `model` and `revision` are empty then, and `metadata` holds what the folder's own
card says of licence, language and purpose. Paths of this machine are not written.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import ModelCard

from vq4dit.config import QuantizationSettings
from vq4dit.errors import FormatError
from vq4dit.job import write_atomically
from vq4dit.json_files import read_object, shown

FILENAME = "vq4dit.json"
COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the base's card to ours


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The base model of a quantized one, and how it was made; empty where that is not known."""

    model: str = ""  # Hub id
    revision: str = ""  # commit
    metadata: dict[str, Any] = field(default_factory=dict)  # COPIED fields of the base's card
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def origin_of(model: str, revision: str | None, settings: QuantizationSettings) -> Origin:
    """The origin of what is quantized now, from a folder, or from a Hub id at a commit (see `loading.pinned`)."""
    is_folder = Path(model).is_dir()
    return Origin(
        model="" if is_folder else model,
        revision="" if is_folder else revision or "",
        metadata=folder_metadata(Path(model)) if is_folder else {},
        settings=settings.to_dict(),
        versions={"vq4dit": own_version(), "torch": torch.__version__, "diffusers": diffusers.__version__},
    )


def own_version() -> str:
    try:
        return version("vq4dit")
    except PackageNotFoundError:  # run from a checkout
        return "not installed as a package"


def folder_metadata(folder: Path) -> dict[str, Any]:
    """The COPIED fields of a folder's own card, if it has one."""
    path = folder / "README.md"
    return copied(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()) if path.is_file() else {}


def copied(metadata: dict[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in COPIED if metadata.get(key)}


def write_origin(folder: Path, origin: Origin) -> None:
    write_atomically(folder / FILENAME, (json.dumps(asdict(origin), indent=1, sort_keys=True) + "\n").encode())


def read_origin(folder: Path) -> Origin:
    """The origin of a quantized model; an empty one if it was made without a record.

    Raises:
        FormatError: if the record is damaged.
    """
    path = folder / FILENAME
    if not path.exists():
        return Origin()
    advice = "delete it, and name the base with --base"
    try:
        origin = Origin(**read_object(path, advice))
    except TypeError as error:  # entries that we do not write
        raise FormatError(f"{path} is damaged ({error}): {advice}") from error
    for name, value in asdict(origin).items():
        kind = str if name in ("model", "revision") else dict
        if not isinstance(value, kind):
            raise FormatError(f"{path} is damaged ({name} is {shown(value)}): {advice}")
    return origin
