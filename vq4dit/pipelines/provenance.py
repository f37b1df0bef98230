"""Where a quantized model comes from and how it was made: `vq4dit.json` beside its weights, written and read with it.

    {"model": "facebook/DiT-XL-2-256", "revision": "<commit>", "fingerprint": "<of the original's weights>",
     "recipe": {"name": "best", "version": 10}, "settings": {...}, "settings_hash": "<SHA-256>", "versions": {...},
     "files": {...}, "seal": "<SHA-256>"}

The last two are the record of the folder's files (`vq4dit/disk/record.py`); earlier versions wrote none. A base that was a
folder has no Hub id: `model` and `revision` are empty then, and `metadata` holds what the folder's own card says of licence,
language and purpose. Paths of this machine are not written.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from vq4dit.config import CallValue, QuantizationSettings, call_items
from vq4dit.disk.files import write_atomically
from vq4dit.disk.job import VERSION as VERSION_OF_RECIPES
from vq4dit.disk.json_files import read_object
from vq4dit.disk.record import FILES, RECORD, SEAL
from vq4dit.errors import FormatError, VQ4DiTError
from vq4dit.pipelines.repository import download, located
from vq4dit.version import VERSION

FILENAME = RECORD
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
    fingerprint: str = ""  # of the base: see `job.fingerprint`
    metadata: dict[str, Any] = field(default_factory=dict)  # COPIED fields of the base's card
    recipe: dict[str, Any] = field(default_factory=dict)  # name, and the version of vq4dit's recipes
    settings: dict[str, Any] = field(default_factory=dict)  # all of them, those of other recipes too
    settings_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)  # of the libraries, and the commit of vq4dit where it is known

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
        prompts = self.settings.get("prompts", [])
        if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"prompts must be texts, got {prompts!r:.100}")
        call_items(self.settings.get("call", {}))
        if self.model and not is_hub_id(self.model):
            raise ValueError(f"the base must be a Hub id, which looks like owner/name, got {self.model!r:.100}")
        if self.revision and not REVISION.fullmatch(self.revision):
            raise ValueError(f"revision must be a commit, branch or tag, got {self.revision!r:.100}")


def origin_of(model: str, revision: str | None, settings: QuantizationSettings) -> Origin:
    """The origin of what is quantized now, from a folder, or from a Hub id at a commit (see `loading.pinned`)."""
    if folder := located(model):
        return replace(made_by(settings), metadata=folder_metadata(folder))
    return replace(made_by(settings), model=model, revision=revision or "")


def made_by(settings: QuantizationSettings, fingerprint: str = "") -> Origin:
    """How something is made here and now, of a base with this fingerprint."""
    return Origin(
        fingerprint=fingerprint,
        recipe={"name": settings.recipe, "version": VERSION_OF_RECIPES},
        settings=recorded_settings(settings),
        settings_hash=hashlib.sha256(json.dumps(settings.to_dict(), sort_keys=True).encode()).hexdigest(),
        versions=versions(),
    )


def recorded_settings(settings: QuantizationSettings) -> dict[str, Any]:
    """All settings, but of somebody's own prompts only the beginnings of their SHA-256: the record may be published."""
    prompts = [hashlib.sha256(prompt.encode()).hexdigest()[:16] for prompt in settings.prompts]
    return settings.to_dict() | {"prompts": prompts}


def versions() -> dict[str, str]:
    """Of the libraries that make the numbers, and the commit of vq4dit if it was installed from one."""
    found = {"vq4dit": VERSION, "torch": torch.__version__, "diffusers": diffusers.__version__}
    return found | ({"vq4dit_commit": commit} if (commit := own_commit()) else {})


def own_commit() -> str:
    """As pip noted it, empty if it did not."""
    try:
        record = json.loads(distribution("vq4dit").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, ValueError):
        return ""
    return str(record.get("vcs_info", {}).get("commit_id", ""))


def folder_metadata(folder: Path) -> dict[str, Any]:
    """The COPIED fields of a folder's own card. A card that cannot be read is no card."""
    path = folder / "README.md"
    try:
        return copied(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()) if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}


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
    if not path.exists():
        return Origin()
    advice = "delete it, and name the base with --base"
    try:
        values = {name: value for name, value in read_object(path, advice).items() if name not in (FILES, SEAL)}
        empty = asdict(Origin())
        if wrong := [name for name, value in values.items() if not isinstance(value, type(empty.get(name)))]:
            raise TypeError(f"{wrong[0]:.50} is not known, or of another kind")
        return Origin(**values)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(
            f"{path} is damaged ({error}): {advice}",
            page=f"the record of where this model comes from is damaged ({error}): quantize it again",
        ) from error


def recorded_call(model: str) -> dict[str, CallValue]:
    """What the call of a packed model's pipeline was told when the model was calibrated: nothing, if that is not recorded.

    Raises:
        FormatError: if the record is damaged, or holds what cannot be told.
    """
    folder = located(model)
    if folder is None:
        try:
            folder = Path(download(model, FILENAME)).parent
        except VQ4DiTError:  # of an earlier version, or not in the cache
            return {}
    return dict(call_items(read_origin(folder).settings.get("call", {})))
