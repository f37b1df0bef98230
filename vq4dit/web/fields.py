"""The fields that say what to draw, as they fit a model: classes or prompts, and how far to follow them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.conditions import condition_kind, parameters_of
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.printable import printable
from vq4dit.projects.catalog import ModelCard
from vq4dit.projects.pair_settings import number_in, prompts_in

EXAMPLES = sorted(HELD_OUT, key=len)[:3]  # short ones: small models know few words
MOST_CLASSES, MOST_SEEDS = 12, 4


def kind_of(card: ModelCard) -> str:
    """See `condition_kind`; "" of a model that nothing can be drawn of."""
    try:
        return condition_kind(pipeline_class(card.pipeline))
    except UnsupportedModelError:
        return ""


def classes(card: ModelCard, link: Mapping[str, str]) -> gr.Dropdown:
    """Those that a link names, else a few."""
    if kind_of(card) != "class_labels":
        return gr.Dropdown(value=None, visible=False)
    named, there = [int(label) for label in link.get("classes", "").split()], card.labels.values()
    value = [label for label in named if label in there] or [card.labels[name] for name in default_labels(card.labels)]
    unknown = ", ".join(str(label) for label in named if label not in there)
    told = f"The link asks for classes that this model does not name: {unknown}." if unknown else ""
    choices = [(printable(name), label) for name, label in card.labels.items()]
    return gr.Dropdown(choices=choices, value=value, info=told, visible=True)


def prompts(card: ModelCard, link: Mapping[str, str]) -> gr.Textbox:
    """Those of a link, else a few that no model is calibrated on."""
    if kind_of(card) != "prompt":
        return gr.Textbox(value="", visible=False)
    return gr.Textbox(value=link.get("prompts") or "\n".join(EXAMPLES), visible=True)


def guidance(card: ModelCard, call: Mapping[str, Any], link: Mapping[str, str]) -> gr.Textbox:
    """That of a link, else as it is; while it is empty it shows the number that counts: the job's, else the pipeline's own."""
    parameters = parameters_of(pipeline_class(card.pipeline)) if kind_of(card) else {}
    if "guidance_scale" not in parameters:
        return gr.Textbox(value="", visible=False)
    own = call.get("guidance_scale", parameters["guidance_scale"].default)
    told = f"{own:g} by default" if isinstance(own, int | float) and math.isfinite(own) else "the model's own"
    asked: dict[str, Any] = {"value": link["guidance"]} if "guidance" in link else {}
    return gr.Textbox(placeholder=told, visible=True, **asked)


def hidden() -> tuple:
    """The fields of a model that cannot be opened."""
    return gr.Dropdown(choices=[], value=None), *(gr.Textbox(value="", visible=False) for _ in range(2))


def in_link(classes: Sequence[int] | None, prompts: str, seeds: int | float, guidance: str) -> dict[str, str]:
    """What a link says of these fields, by the names of its parameters: what stands there at first is not said of prompts,
    seeds and guidance, nor what could not be drawn. (Which classes are the first ones is the model's to say.)
    """
    examples = prompts.split("\n") == EXAMPLES
    told = {"classes": " ".join(map(str, classes or ()))}
    told["prompts"] = "\n".join(prompts_in(prompts)) if are_prompts(prompts) and not examples else ""
    told["seeds"] = f"{seeds:.0f}" if seeds != 1 else ""
    told["guidance"] = guidance.strip() if is_guidance(guidance) else ""
    return {name: text for name, text in told.items() if text}


def is_class(text: str) -> bool:
    """Whether this can be the number of a class."""
    return text.isdecimal() and len(text) < 10


def are_prompts(text: str) -> bool:
    """Whether a text has prompts, and not more than can be drawn."""
    try:
        return bool(prompts_in(text))
    except ValueError:
        return False


def is_guidance(text: str) -> bool:
    try:
        return number_in(text) is not None
    except ValueError:
        return False


def default_labels(names: Mapping[str, int]) -> list[str]:
    """Four classes, spread over all."""
    listed = list(names)
    count = min(4, len(listed))
    return [listed[i * len(listed) // count] for i in range(count)]
