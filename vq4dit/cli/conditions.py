"""What a command tells a pipeline: the prompts or classes to draw, and what else its call takes."""

from __future__ import annotations

import argparse
from typing import Any

from vq4dit.bundled import suggested_call
from vq4dit.denoisers import denoiser_of
from vq4dit.evaluation.images import label_ids, some_conditions
from vq4dit.models.conditions import Condition, condition_kind
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.provenance import recorded_call


def conditions_of(pipeline: Any, args: argparse.Namespace) -> list[Condition]:
    """The prompts or classes that were asked for; without any, eight of all.

    Raises:
        ValueError: if these are not what the pipeline draws from, or there is no such class.
    """
    check_prompts(pipeline, args.prompts)
    if not args.labels:
        return list(args.prompts or some_conditions(pipeline))
    if condition_kind(pipeline) == "prompt":
        raise ValueError(
            f"{type(pipeline).__name__} draws from prompts, not from classes: say --prompt TEXT or --prompts FILE instead of "
            "--labels"
        )
    return list(label_ids(pipeline, args.labels))


def check_prompts(pipeline: Any, prompts: list[str] | None) -> None:
    """Raise `ValueError` if there are prompts and the pipeline draws from something else."""
    if prompts and condition_kind(pipeline) != "prompt":
        raise ValueError(
            f"{type(pipeline).__name__} draws from classes, not from prompts: say --labels A,B instead of --prompt or "
            "--prompts (`quantize` needs none: it takes classes at random)"
        )


def call_of(pipeline: Any, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the pipeline's call is told: what a packed model was calibrated with, unless --call or --guidance say otherwise.

    An original is told those, or, without any, what is suggested for a bundled model.
    """
    given = dict(args.call)
    return {**recorded_call(model), **given} if packed_layers(denoiser_of(pipeline)) else given or suggested_call(model)
