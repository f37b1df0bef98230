"""Links to settings: what the page's address says, and the address that says it."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import parse_qsl, urlencode

import gradio as gr

from vq4dit.bundled import suggested_call
from vq4dit.config import CODEBOOKS, RECIPES, QuantizationSettings
from vq4dit.pipelines.references import Components
from vq4dit.pipelines.repository import hub_id
from vq4dit.projects.call_lines import written
from vq4dit.projects.workspace import Project

SEEDS = 2**53  # as many whole numbers as a browser can tell apart
EXPECTED = {
    "bits": f"bits are {', '.join(map(str, sorted(CODEBOOKS)))}",
    "recipe": f"recipes are {', '.join(RECIPES)}",
    "seed": "a seed is a whole number from 0 to 2^53 - 1",
}
CAN_BE: dict[str, Callable[[str], bool]] = {
    "bits": lambda text: text in map(str, CODEBOOKS),
    "recipe": lambda text: text in RECIPES,
    "seed": lambda text: text.isdecimal() and len(text) <= 16 and int(text) < SEEDS,
}


def asked(request: gr.Request) -> dict[str, str]:
    """What the address asks for.

    On its way to the login it is quoted as a whole (see `push_panel`), and so it stands in the browser's history: who goes
    back from there, or reloads, asks for the same.
    """
    query = dict(request.query_params)
    return query if "model" in query else dict(parse_qsl("&".join(query))) or query


def chosen(query: dict[str, str], last: Project | None) -> tuple:
    """Model, bits, recipe, seed, keep, call, components: from the link, else from the last job, else as the page has them."""
    if "model" in query:
        told = {name: query[name] for name, can_be in CAN_BE.items() if name in query and can_be(query[name])}
        bits, seed = int(told.get("bits", 2)), int(told.get("seed", 0))
        model, call = hub_id(query["model"][:200]), query.get("call")
        further = query.get("keep", "")[:500], suggested(model) if call is None else call[:2000]
        components = "reference" if query.get("components") == "reference" else "copy"
        return model, bits, told.get("recipe", "best"), seed, *further, components
    if last is None:
        return (gr.skip(),) * 7
    s = last.settings
    return last.model, s.bits, s.recipe, s.seed, " ".join(s.keep), "\n".join(written(s.call_arguments)), last.components


def misunderstood(query: dict[str, str]) -> list[str]:
    """Words on what a link asks for that cannot be: the page then has what it has without it."""
    wrong = [name for name, can_be in CAN_BE.items() if name in query and not can_be(query[name])]
    return [f"{name}={query[name][:40]} is not understood: {EXPECTED[name]}." for name in wrong] if "model" in query else []


def suggested(model: str) -> str:
    """What the call of a bundled model's pipeline must be told, one NAME=VALUE a line; of others we do not know."""
    return "\n".join(written(suggested_call(model)))


def link_of(model: str, settings: QuantizationSettings, components: Components = "copy") -> str:
    """Query parameters that restore these settings, made absolute by the page that shows them."""
    values = {"model": model, "bits": settings.bits, "recipe": settings.recipe, "seed": settings.seed}
    further = {"keep": " ".join(settings.keep), "call": "\n".join(written(settings.call_arguments))}
    further["components"] = components if components != "copy" else ""
    return "?" + urlencode(values | {name: text for name, text in further.items() if text})
