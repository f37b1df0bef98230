"""The page's pieces as HTML: hero, command, progress, chart, table, log, trouble.

Everything that comes from outside is escaped here. Pictures travel inside the page (data URIs), so no visitor's picture is
ever a file that others could fetch.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vq4dit.config import QuantizationSettings
from vq4dit.pipelines.references import Components
from vq4dit.progress import Event
from vq4dit.projects.call_lines import written
from vq4dit.projects.project import Project, Status
from vq4dit.projects.work_queue import Place
from vq4dit.web.messages import Trouble, clock, duration, escape

LOG_LINES = 60
STAGES = {
    "cluster": "Fitting codebooks",
    "calibrate": "Calibrating",
    "sensitivity": "Measuring what matters",
    "trajectories": "Recording trajectories",
    "bits": "Allocating bits",
    "fit": "Fitting layer by layer",
    "sample": "Drawing",
    "measure": "Measuring",
}
PHASES = {
    "new": "Ready",
    "queued": "Queued",
    "running": "Running",
    "waiting": "Waiting",
    "paused": "Paused",
    "done": "Done",
    "failed": "Failed",
}


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def hero(picture: Path) -> str:
    """One sentence and one picture."""
    alt = "Eight emoji drawn by the original model, the same eight by the model at 2 bits, and their differences"
    rows = "".join(f"<li>{row}</li>" for row in ("original", "at 2 bits", "difference × 4"))
    return (
        '<header class="hero"><div><p class="brand"><span aria-hidden="true" class="mark"></span>vq4dit</p>'
        "<h1>A diffusion transformer in a seventh of its bytes.</h1>"
        "<p>Pick one, choose 2, 3 or 4 bits per weight, watch it shrink, and see with the same seeds what that changed.</p>"
        "</div>"
        f'<figure><div class="sheet"><ul aria-hidden="true">{rows}</ul><img src="{data_uri(picture.read_bytes())}" alt="{alt}">'
        "</div><figcaption>The bundled model: 25 MB of transformer, then 3.6 MB.</figcaption></figure></header>"
    )


def heading(number: int, title: str, text: str) -> str:
    return f'<div class="heading"><span class="number" aria-hidden="true">{number}</span><h2>{title}</h2><p>{text}</p></div>'


def empty(text: str) -> str:
    return f'<p class="empty">{text}</p>'


def trouble(found: Trouble, is_asked_for: bool = False) -> str:
    """What happened, why, what next; calmly if the visitor asked for it."""
    details = f"<details><summary>Details</summary><pre>{escape(found.details)}</pre></details>" if found.details else ""
    opening = '<div class="trouble calm" role="status">' if is_asked_for else '<div class="trouble" role="alert">'
    return (
        f"{opening}<strong>{escape(found.what)}</strong><p>{escape(found.why)}</p>"
        f'<p class="next"><b>What to do:</b> {linked(escape(found.next_step))}</p>{details}</div>'
    )


def linked(text: str) -> str:
    """Escaped text with its web addresses as links."""
    return re.sub(r"https?://[\w./:-]*\w", r'<a href="\g<0>" target="_blank" rel="noopener">\g<0></a>', text)


def command_of(model: str, settings: QuantizationSettings, output: str, components: Components = "copy") -> str:
    """The same thing in a terminal."""
    words = ["python -m vq4dit quantize", _quoted(model), f"--bits {settings.bits}", f"--recipe {settings.recipe}"]
    words += [f"--seed {settings.seed}"] + [f"--keep {_quoted(pattern)}" for pattern in settings.keep]
    words += [f"--call {_quoted(line)}" for line in written(settings.call_arguments)]
    words += [f"--components {components}"] if components != "copy" else []
    return " ".join([*words, f"--output {_quoted(output)}"])


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[\w./=-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def copyable(label: str, text: str, element: str) -> str:
    """A line to copy, with a button that works by keyboard too."""
    click = (
        "const c = this.previousElementSibling, a = c.querySelector('a');"
        "navigator.clipboard.writeText(a ? a.href : c.textContent);this.textContent = 'Copied';"
        "setTimeout(() => { this.textContent = 'Copy' }, 2000)"
    )
    content = f'<a href="{escape(text)}">{escape(text)}</a>' if text.startswith("?") else escape(text)
    return (
        f'<div class="copyable" id="{element}"><span>{label}</span><code tabindex="0">{content}</code>'
        f'<button type="button" onclick="{click}" aria-label="Copy: {label}">Copy</button></div>'
    )


def progress(
    project: Project, status: Status, events: Sequence[Event], seconds_left: float | None, place: Place | None = None
) -> str:
    """The state of a project in one line and one bar, and where it waits."""
    last = events[-1] if events else None
    share = last.share() if last else 0.0
    if status.phase == "done":
        share = 1.0
    stage = STAGES.get(last.stage, last.stage.replace("_", " ").capitalize()) if last else "Reading the model"
    far = f"{stage}: {last.done} of {last.total}" if last else stage
    if status.phase == "running":
        far += f" · {clock(project.seconds_so_far(status))} so far"
    if status.is_under_way and seconds_left is not None:
        far += f" · about {duration(seconds_left)} left"
    if status.is_under_way and place is not None:
        far = turn_comes(place) + (f" · {far}" if last else "")
    told = f"<b>{escape(project.title)}</b>"
    line = f"<p>{far}</p>"  # no status for screen readers: it changes twice a second
    if status.phase == "done":
        told, line = f"{told} is packed, after {duration(status.seconds)}", ""
    label = f"{PHASES[status.phase]}: {far}"
    return (
        f'<div class="progress {status.phase}" data-phase="{status.phase}"><p role="status"><span class="pill">'
        f"{PHASES[status.phase]}</span> {told}</p>{line}"
        f'<div class="bar" role="progressbar" aria-label="{label}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><i style="width:{100 * share:.1f}%"></i></div></div>'
    )


def turn_comes(place: Place) -> str:
    """When a job that waits will go on; in steps that can be read."""
    if not place.before:
        return "Its turn comes now"
    jobs = "1 job" if place.before == 1 else f"{place.before} jobs"
    return f"{jobs} before yours, about {duration(10 * math.ceil(place.seconds / 10))}"


def layers_table(layers: Sequence[dict[str, Any]]) -> str:
    if not layers:
        return empty("Finished layers are listed here.")
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(layer["name"])}</code></th><td>{layer["rows"]} × {layer["columns"]}</td>'
        f"<td>{layer['bits_per_weight']:.2f}</td>"
        f"<td>{layer['relative_error']:.4f}</td></tr>"
        if {"relative_error", "bits_per_weight"} <= layer.keys()
        else f'<tr><th scope="row"><code>{escape(layer["name"])}</code></th><td colspan="3"></td></tr>'
        for layer in layers
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Finished layers"><table><thead><tr><th>layer</th>'
        f"<th>shape</th><th>bits per weight</th><th>error</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def log(events: Sequence[Event]) -> str:
    """The newest lines, newest first."""
    if not events:
        return empty("The log begins when the work does.")
    lines = []
    for event in reversed(events[-LOG_LINES:]):
        figures = "  ".join(f"{name} {value:.3g}" for name, value in event.metrics.items())
        lines.append(f"{event.seconds:7.1f} s  {event.stage} {event.done}/{event.total}  {event.layer}  {figures}".rstrip())
    content = escape("\n".join(lines))
    return f'<pre class="log" tabindex="0" role="log" aria-label="Log, newest first">{content}</pre>'


def note(text: str) -> str:
    return f'<p class="note" role="status">{escape(text)}</p>'


def welcome(name: str, phase: str) -> str:
    """Offered on return."""
    told = f"<b>Your last job:</b> {escape(name)}, {escape(phase)}."
    return f'<p class="welcome" role="status">{told} <a href="#run">Go to it</a></p>'


def score(game: dict[str, Any]) -> str:
    """The running score of the blind test."""
    total, right = game.get("total", 0), game.get("right", 0)
    told = "" if game.get("open") or not total else ("Right. " if game.get("was") else "No, the other one. ")
    chance = " A coin would get half." if total >= 4 else ""
    so_far = f"<b>{right} of {total}</b> right.{chance}" if total else "Which one is the original?"
    return f'<p class="score" role="status">{told}{so_far}</p>'


def load_snippet(name: str, components: Components = "copy") -> str:
    """The lines that load what was downloaded."""
    code = f'import vq4dit\nfrom diffusers import DiffusionPipeline\npipeline = DiffusionPipeline.from_pretrained("{name}")'
    if components == "reference":
        code = f'from vq4dit.pipelines.load import load_pipeline\npipeline = load_pipeline("{name}")'
    return f'<p class="note">Unpack it, then:</p><pre class="snippet" tabindex="0">{escape(code)}</pre>'
