"""Links to settings: what the page's address says, and the address that says it."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlencode

import gradio as gr

from vq4dit.bundled import suggested_call
from vq4dit.config import QuantizationSettings
from vq4dit.pipelines.references import Components
from vq4dit.pipelines.repository import hub_id
from vq4dit.projects.call_lines import written
from vq4dit.projects.workspace import Project


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
        bits, seed = query.get("bits", "2"), query.get("seed", "0")
        whole = int(bits) if bits.isdecimal() else 2, int(seed) if seed.isdecimal() else 0
        model, call = hub_id(query["model"][:200]), query.get("call")
        further = query.get("keep", "")[:500], suggested(model) if call is None else call[:2000]
        components = "reference" if query.get("components") == "reference" else "copy"
        return model, whole[0], query.get("recipe", "best"), whole[1], *further, components
    if last is None:
        return (gr.skip(),) * 7
    s = last.settings
    return last.model, s.bits, s.recipe, s.seed, " ".join(s.keep), "\n".join(written(s.call_arguments)), last.components


def suggested(model: str) -> str:
    """What the call of a bundled model's pipeline must be told, one NAME=VALUE a line; of others we do not know."""
    return "\n".join(written(suggested_call(model)))


def link_of(model: str, settings: QuantizationSettings, components: Components = "copy") -> str:
    """Query parameters that restore these settings, made absolute by the page that shows them."""
    values = {"model": model, "bits": settings.bits, "recipe": settings.recipe, "seed": settings.seed}
    further = {"keep": " ".join(settings.keep), "call": "\n".join(written(settings.call_arguments))}
    further["components"] = components if components != "copy" else ""
    return "?" + urlencode(values | {name: text for name, text in further.items() if text})
