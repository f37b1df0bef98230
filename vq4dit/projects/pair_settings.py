"""Which pairs somebody wants drawn: conditions, seeds, guidance, as the fields of a page say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vq4dit.errors import UnsupportedModelError, VQ4DiTError
from vq4dit.models.conditions import Condition, condition_kind, parameters_of
from vq4dit.pipelines.repository import read_json
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.projects.project import Project

MOST_PROMPTS, LONGEST_PROMPT = 12, 500  # that a page draws at once, and their characters


class Key(NamedTuple):
    """What a pair is of."""

    condition: Condition
    seed: int
    guidance_scale: float | None  # None: as the project's settings have it, or the pipeline by default


@dataclass(frozen=True)
class PairSettings:
    """Which pictures to draw: every condition with every seed."""

    conditions: tuple[Condition, ...]
    num_seeds: int = 1
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None

    @classmethod
    def of(cls, project: Project, classes: Sequence[int], prompts: str, num_seeds: int, guidance: str) -> PairSettings:
        """Those of what a page holds for both kinds of models: classes and prompts, of which this project's takes one.

        Args:
            prompts: one a line.
            guidance: a number, or nothing: then it is that of the project.

        Raises:
            VQ4DiTError: if no pictures can be drawn of this kind of model; ValueError if there are no classes, no prompts or
                too many, or the guidance is no number.
        """
        index = read_json(str(project.result), "model_index.json")
        pipeline = pipeline_class(index["_class_name"])
        try:
            kind = condition_kind(pipeline)
        except UnsupportedModelError as error:  # its advice is of the recipe, and the model is packed
            found = f"pairs are drawn of what needs a prompt or a class only, and {pipeline.__name__} needs more"
            raise VQ4DiTError(f"{found}: load the packed model and call it yourself") from error
        labels = classes if index.get("id2label") else classes or (0,)  # without names there is nothing to choose
        conditions: Sequence[Condition] = prompts_in(prompts) if kind == "prompt" else labels
        if not conditions:
            raise ValueError("classes are needed to draw, and none is chosen: choose at least one")
        scale = number_in(guidance) if "guidance_scale" in parameters_of(pipeline) else None
        return cls(tuple(conditions), num_seeds, guidance_scale=scale)

    def wanted(self) -> list[Key]:
        """All conditions of the first seed before the second seed."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        return [Key(condition, seed, self.guidance_scale) for seed in seeds for condition in self.conditions]

    def call(self, project: Project) -> dict[str, Any]:
        """What both pipelines' calls are told."""
        own = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return project.settings.call_arguments | own


def number_in(text: str) -> float | None:
    """The number in a field; None of an empty one."""
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"guidance must be a number, such as 4.5, got {text!r:.60}")
    return number


def prompts_in(text: str) -> list[str]:
    """The prompts in a text, one a line, each once.

    Raises:
        ValueError: if there are none, or more than a page draws.
    """
    lines = text.encode(errors="ignore").decode().splitlines()  # a half of a character is no text
    prompts = list(dict.fromkeys(filter(None, map(str.strip, lines))))
    if not prompts:
        raise ValueError("prompts are needed to draw, and there are none: write one a line")
    if len(prompts) > MOST_PROMPTS or max(map(len, prompts)) > LONGEST_PROMPT:
        raise ValueError(
            f"at most {MOST_PROMPTS} prompts of {LONGEST_PROMPT} characters are drawn at once, got {len(prompts)} of up to "
            f"{max(map(len, prompts))}: take fewer or shorter ones"
        )
    return prompts
