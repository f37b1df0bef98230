"""What a visitor has chosen, and the settings that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vq4dit.config import CODEBOOKS, RECIPES, QuantizationSettings
from vq4dit.pipelines.references import Components
from vq4dit.pipelines.repository import hub_id
from vq4dit.projects.call_lines import read_call
from vq4dit.web.links import SEEDS


@dataclass(frozen=True)
class Choice:
    """What a visitor has chosen, as it comes from the page."""

    model: str
    bits: int
    recipe: str
    seed: int | float | None  # an emptied number field holds nothing
    keep: str
    call: str = ""  # NAME=VALUE, one a line
    components: Components = "copy"

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", hub_id(self.model or ""))  # an emptied field holds nothing; a pasted one an address

    def settings(self) -> QuantizationSettings:
        seed = self.seed or 0
        if not 0 <= seed < SEEDS or seed != int(seed):
            raise ValueError(f"seed must be a whole number from 0 to 2^53 - 1, got {seed:g}")
        recipe: Any = self.recipe
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        keep, call = tuple(self.keep.split()), read_call(self.call)
        return QuantizationSettings(bits=int(self.bits), recipe=recipe, seed=int(seed), keep=keep, call=call)


def widths_offered() -> list[tuple[str, int]]:
    return [(f"{bits} bits", bits) for bits in sorted(CODEBOOKS)]
