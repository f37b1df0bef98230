"""How much of the transformer one sample takes while we learn from it, as far as classes and configs tell.

Before anything is loaded nobody can rehearse, and yet people want to know what the work will cost. So it is counted here, from
a pipeline without weights: a picture or film of the size that calibration takes, and a text as long as the call lets it be.
Most models see both in one row, so the sum is taken: for those that keep them apart it is a little more than there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vq4dit.models.conditions import condition_kind, knows_no_class, parameters_of
from vq4dit.models.rehearsal import FRAMES, latent_frames, small_size, spatial_scale

USUAL_LATENTS = 32  # height and width of latents that nothing is said about
USUAL_TEXT = 128  # tokens of a text, where the call does not take how many
GUIDANCE = ("true_cfg_scale", "guidance_scale")  # the first that a call takes is the one that asks the transformer twice


@dataclass(frozen=True)
class Positions:
    """Of one sample."""

    picture: int = USUAL_LATENTS**2  # or film, or sound
    text: int = 0
    passes: int = 2  # through the transformer in each step: guidance needs one without the condition
    has_prompts: bool = False

    @property
    def tokens(self) -> int:
        """That the transformer sees together."""
        return self.picture + self.text

    @property
    def rows(self) -> int:
        """That a layer sees in one step: `Sampling.tokens`, about."""
        return self.passes * self.tokens


def positions_of(pipeline: Any, call: Mapping[str, Any]) -> Positions:
    """Of a sample of this pipeline, which needs no weights.

    Args:
        call: what its call is told; the rest is as calibration has it.
    """
    told = {name: parameter.default for name, parameter in parameters_of(pipeline).items()} | small_size(pipeline) | dict(call)
    has_prompts = condition_kind(pipeline) == "prompt"
    text = _number(told.get("max_sequence_length"), USUAL_TEXT) if has_prompts else 0
    return Positions(_of_picture(pipeline, told), text, _passes(pipeline, told), has_prompts)


def _of_picture(pipeline: Any, told: Mapping[str, Any]) -> int:
    frames = next((_number(told[name], 1) for name in FRAMES if name in told), 1)
    config = pipeline.transformer.config
    patch = _number(config.get("patch_size"), 1)
    latents = _number(config.get("sample_size"), USUAL_LATENTS)
    if "height" not in told and "patch_size" not in config:  # sound: its latents have one dimension
        return latents
    sides = 1
    for side in ("height", "width"):
        of_latents = _number(config.get(f"sample_{side}"), latents)
        pixels = _number(told.get(side), 0)
        sides *= max(1, pixels // spatial_scale(pipeline) if pixels else of_latents // patch)
    return sides * latent_frames(pipeline, frames)


def _passes(pipeline: Any, told: Mapping[str, Any]) -> int:
    if condition_kind(pipeline) == "class_labels" and not knows_no_class(pipeline):
        return 1
    scale = next((told[name] for name in GUIDANCE if name in told), None)
    return 1 if isinstance(scale, int | float) and scale <= 1 else 2


def _number(value: Any, otherwise: int) -> int:
    """A length that is given as a number, or as one for each dimension, or not at all."""
    given = value if isinstance(value, list | tuple) else [value]
    return max((int(number) for number in given if isinstance(number, int | float) and number >= 1), default=otherwise)
