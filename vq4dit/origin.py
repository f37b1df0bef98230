"""Where a quantized model comes from: `vq4dit.json` beside its weights, written when it is made, read when it is published.

    {"base": {"model": "facebook/DiT-XL-2-256", "revision": "<commit>"}, "settings": {...}, "versions": {...}}

A base that was a folder has no Hub id: `model` and `revision` are empty then, and `metadata` holds what the folder's own
card says of licence, language and purpose. Paths of this machine are not written.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vq4dit.config import QuantizationSettings
from vq4dit.errors import FormatError
from vq4dit.job import write_atomically

FILENAME = "vq4dit.json"
# From the base's card to ours, if they look like what they should be: the card of a stranger may say anything.
COPIED = {
    "license": re.compile(r"[\w.+-]{1,50}", re.ASCII),
    "license_name": re.compile(r"[\w .,+()/-]{1,100}"),
    "license_link": re.compile(r"(https?://[\w.-]+(:\d+)?/)?[\w.~%+-]+(/[\w.~%+-]+)*/?", re.ASCII),
    "language": re.compile(r"[A-Za-z]{2,3}([_-][A-Za-z0-9]{2,8})*"),
    "pipeline_tag": re.compile(r"[a-z0-9-]{1,50}"),
}
REVISION = re.compile(r"\w[\w./-]{0,99}", re.ASCII)  # a commit, branch or tag


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The base model of a quantized one, and how it was made; empty where that is not known."""

    model: str = ""  # Hub id
    revision: str = ""  # commit
    metadata: dict[str, Any] = field(default_factory=dict)  # COPIED fields of the base's card
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `ValueError` if something is not what it is called: the record of a stranger may say anything."""
        for name, kind in (("model", str), ("revision", str), ("metadata", dict), ("settings", dict), ("versions", dict)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r:.100}")
        keep, calibration = self.settings.get("keep", []), self.settings.get("calibration", {})
        if not isinstance(keep, list | tuple) or not all(isinstance(pattern, str) for pattern in keep):
            raise ValueError(f"keep must be patterns of layer names, got {keep!r:.100}")
        if not isinstance(calibration, dict):
            raise ValueError(f"calibration must be settings by their names, got {calibration!r:.100}")
        if self.model and not is_hub_id(self.model):
            raise ValueError(f"the base must be a Hub id, which looks like owner/name, got {self.model!r:.100}")
        if self.revision and not REVISION.fullmatch(self.revision):
            raise ValueError(f"revision must be a commit, branch or tag, got {self.revision!r:.100}")


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
    """Of a card's metadata, what goes into ours."""
    return {key: metadata[key] for key, shape in COPIED.items() if _fits(metadata.get(key), shape)}


def _fits(value: Any, shape: re.Pattern[str]) -> bool:
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(word, str) and shape.fullmatch(word) for word in values)


def is_hub_id(name: str) -> bool:
    """Whether this can be the name of a repository, "owner/name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.isascii() and "/" in name


def write_origin(folder: Path, origin: Origin) -> None:
    write_atomically(folder / FILENAME, (json.dumps(asdict(origin), indent=1, sort_keys=True) + "\n").encode())


def read_origin(folder: Path) -> Origin:
    """The origin of a quantized model; an empty one if it was made without a record.

    Raises:
        FormatError: if the record is damaged.
    """
    path = folder / FILENAME
    if not path.is_file():
        return Origin()
    try:
        return Origin(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}): delete it, and name the base with --base",
            page=f"the record of where this model comes from is damaged ({error}): quantize it again",
        ) from error
