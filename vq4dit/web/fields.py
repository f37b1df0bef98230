"""The fields that say what to draw, as they fit a model: classes or prompts, and how far to follow them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gradio as gr

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.conditions import condition_kind, parameters_of
from vq4dit.models.prompts import HELD_OUT
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.printable import printable
from vq4dit.projects.catalog import ModelCard

EXAMPLES = sorted(HELD_OUT, key=len)[:3]  # short ones: small models know few words
MOST_CLASSES = 12


def kind_of(card: ModelCard) -> str:
    """See `condition_kind`; "" of a model that nothing can be drawn of."""
    try:
        return condition_kind(pipeline_class(card.pipeline))
    except UnsupportedModelError:
        return ""


def classes(card: ModelCard, link: Mapping[str, str]) -> gr.Dropdown:
    """Those that a link names, else a few."""
    if kind_of(card) != "class_labels":
        return gr.Dropdown(visible=False)
    named = [int(label) for label in link.get("classes", "").split()[:MOST_CLASSES] if label.isdecimal()]
    asked = [label for label in named if label in card.labels.values()]
    value = asked or [card.labels[label] for label in default_labels(card.labels)]
    return gr.Dropdown(choices=[(printable(name), label) for name, label in card.labels.items()], value=value, visible=True)


def prompts(card: ModelCard, link: Mapping[str, str]) -> gr.Textbox:
    """Those of a link, else a few that no model is calibrated on."""
    return gr.Textbox(value=link.get("prompts") or "\n".join(EXAMPLES), visible=kind_of(card) == "prompt")


def guidance(card: ModelCard, call: Mapping[str, Any]) -> gr.Textbox:
    """Empty, with the number that then counts: that of the job, else the pipeline's own."""
    parameters = parameters_of(pipeline_class(card.pipeline)) if kind_of(card) else {}
    if "guidance_scale" not in parameters:
        return gr.Textbox(value="", visible=False)
    own = call.get("guidance_scale", parameters["guidance_scale"].default)
    told = f"{own:g} by default" if isinstance(own, int | float) and math.isfinite(own) else "the model's own"
    return gr.Textbox(placeholder=told, visible=True)


def hidden() -> tuple:
    """The fields of a model that cannot be opened."""
    return gr.Dropdown(choices=[], value=None), gr.Textbox(visible=False), gr.Textbox(value="", visible=False)


def default_labels(names: Mapping[str, int]) -> list[str]:
    """Four classes, spread over all."""
    listed = list(names)
    count = min(4, len(listed))
    return [listed[i * len(listed) // count] for i in range(count)]
