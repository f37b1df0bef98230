"""Links to settings: what the page's address says, and the address that says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, urlencode

import gradio as gr

from vq4dit.bundled import suggested_call
from vq4dit.config import CODEBOOKS, RECIPES, QuantizationSettings
from vq4dit.pipelines.references import COMPONENTS, Components
from vq4dit.pipelines.repository import hub_id
from vq4dit.projects.call_lines import written
from vq4dit.projects.pair_settings import LONGEST_PROMPT, MOST_PROMPTS
from vq4dit.projects.project import Project
from vq4dit.web import fields

SEEDS = 2**53  # as many whole numbers as a browser can tell apart
NOTHING: Mapping[str, str] = {}
LONGEST = 2000  # characters of a link: what mail, chats and servers pass on whole
EXPECTED = {
    "bits": f"bits are {', '.join(map(str, sorted(CODEBOOKS)))}",
    "recipe": f"recipes are {', '.join(RECIPES)}",
    "seed": "a seed is a whole number from 0 to 2^53 - 1",
    "components": f"components are {' or '.join(COMPONENTS)}",
    "classes": f"classes are numbers, at most {fields.MOST_CLASSES}, separated by spaces",
    "prompts": f"prompts are at most {MOST_PROMPTS} lines of {LONGEST_PROMPT} characters",
    "seeds": f"seeds of each are a number from 1 to {fields.MOST_SEEDS}",
    "guidance": "a guidance is a number, such as 4.5",
}
CAN_BE: dict[str, Callable[[str], bool]] = {
    "bits": lambda text: text in map(str, CODEBOOKS),
    "recipe": lambda text: text in RECIPES,
    "seed": lambda text: text.isdecimal() and len(text) <= 16 and int(text) < SEEDS,
    "components": lambda text: text in COMPONENTS,
    "classes": lambda text: len(text.split()) <= fields.MOST_CLASSES and all(map(fields.is_class, text.split())),
    "prompts": fields.are_prompts,
    "seeds": lambda text: text in map(str, range(1, fields.MOST_SEEDS + 1)),
    "guidance": fields.is_guidance,
}


def asked(request: gr.Request) -> dict[str, str]:
    """What the address asks for.

    On its way to the login it is quoted as a whole (see `push_panel`), and so it stands in the browser's history: who goes
    back from there, or reloads, asks for the same.
    """
    query = dict(request.query_params)
    return query if "model" in query else dict(parse_qsl("&".join(query))) or query


def understood(query: dict[str, str]) -> dict[str, str]:
    """What the address asks for and can be, without a model nothing; what is empty is not asked for."""
    if "model" not in query:
        return {}
    told = {name: text for name, text in query.items() if text and (name not in CAN_BE or CAN_BE[name](text))}
    return told | {"model": hub_id(query["model"][:200])}


def misunderstood(query: dict[str, str]) -> list[str]:
    """Words on what a link asks for that cannot be: the page then has what it has without it."""
    wrong = [name for name in CAN_BE if query.get(name) and not CAN_BE[name](query[name])] if "model" in query else []
    return [f"{name}={query[name][:40]} is not understood: {EXPECTED[name]}." for name in wrong]


def chosen(query: dict[str, str], last: Project | None) -> tuple:
    """Model, bits, recipe, seed, keep, call, components: from the link, else from the last job, else as the page has them."""
    if told := understood(query):
        bits, seed = int(told.get("bits", 2)), int(told.get("seed", 0))
        model, call = told["model"], query.get("call")
        further = query.get("keep", "")[:500], suggested(model) if call is None else call[:2000]
        return model, bits, told.get("recipe", "best"), seed, *further, told.get("components", "copy")
    if last is None:
        return (gr.skip(),) * 7
    s = last.settings
    return last.model, s.bits, s.recipe, s.seed, " ".join(s.keep), "\n".join(written(s.call_arguments)), last.components


def suggested(model: str) -> str:
    """What the call of a bundled model's pipeline must be told, one NAME=VALUE a line; of others we do not know."""
    return "\n".join(written(suggested_call(model)))


def link_of(
    model: str, settings: QuantizationSettings, components: Components = "copy", drawn: Mapping[str, str] = NOTHING
) -> str:
    """Query parameters that restore these settings, made absolute by the page that shows them.

    Args:
        drawn: what the fields say to draw, see `fields.in_link`. Prompts that make the link too long stay out.
    """
    values = {"model": model, "bits": settings.bits, "recipe": settings.recipe, "seed": settings.seed}
    further = {"keep": " ".join(settings.keep), "call": "\n".join(written(settings.call_arguments))}
    further |= {"components": components if components != "copy" else "", **drawn}
    values |= {name: text for name, text in further.items() if text}
    link = "?" + urlencode(values)
    return link if len(link) <= LONGEST else "?" + urlencode({k: text for k, text in values.items() if k != "prompts"})
