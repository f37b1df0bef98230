"""What is known of the model that was quantized, and what follows for what is published: name, licence, who may see it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vq4dit.pipelines.provenance import copied

NON_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial|research|amlr")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model as the Hub shows it to this login, or as a folder says of itself."""

    model: str = ""  # Hub id; empty for a folder
    revision: str = ""  # commit
    metadata: dict[str, Any] = field(default_factory=dict)  # licence, language, pipeline tag
    restricted: str = ""  # "gated" or "private"

    @property
    def name(self) -> str:
        return self.model or "a model that is not on the Hub"


def default_visibility(base: Base) -> tuple[bool, str]:
    """Whether a quantized model should be private at first, and why."""
    licence = licence_of(base)
    if base.restricted:
        return True, f"its base {base.model} is {base.restricted}"
    if licence.lower() in ("", "unknown", "other"):
        return True, "the licence of its base is not known"
    if NON_COMMERCIAL.search(licence.lower()):
        return True, f"the licence of its base, {licence}, does not allow commercial use"
    return False, f"the licence of its base, {licence}, allows it"


def licence_of(base: Base) -> str:
    """Its name, "" if none is known."""
    metadata = copied(base.metadata)
    return str(metadata.get("license_name") or metadata.get("license") or "")


def default_name(base: str, bits: int) -> str:
    """A repository name from the base's: "facebook/DiT-XL-2-256" at 2 bits -> "DiT-XL-2-256-vq4dit-2bit"."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(base).name).strip("-.") or "model"
    return f"{stem}-vq4dit-{bits}bit"
