"""The page's event handlers: each takes what components hold and gives what they shall show.

A visitor's login comes with every event, by the type of an argument; what is put into the server's queue keeps it, in memory,
until it is over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from vq4dit.bundled import BUNDLED
from vq4dit.pipelines.references import Components
from vq4dit.projects.catalog import FOLDER
from vq4dit.projects.project import Project, Status
from vq4dit.projects.worker import time_left
from vq4dit.web import card_html, charts, fields, html, links
from vq4dit.web.choice import Choice
from vq4dit.web.messages import Trouble, explain, in_words, size
from vq4dit.web.studio import Studio


class Answers:
    """One method per event; whatever fails becomes words on the page."""

    def __init__(self, studio: Studio):
        self.studio = studio

    # --- arriving, picking, choosing ---

    def arrive(self, key: str, request: gr.Request, token: gr.OAuthToken | None) -> tuple:
        """Who is this, what were they doing, and what does the link say?"""
        visitor = self.studio.workspace.visitor(key)
        projects = self.studio.workspace.projects(visitor)
        last = projects[0] if projects else None
        query = links.asked(request)
        choice = links.chosen(query, last)
        if choice[-1] == "reference" and not self.studio.catalog.is_on_the_hub(choice[0]):
            choice = *choice[:-1], "copy"
        seeds = int(links.understood(query).get("seeds", 0)) or gr.skip()
        told = "".join(map(html.note, links.misunderstood(query))) + (greeting(last) if last else "")
        welcome = gr.HTML(told, visible=True) if told else gr.skip()
        # Card and classes come along: looked up by an event of their own they might overtake, and undo, a first click.
        is_known, project_key = isinstance(choice[0], str), last.key if last else ""
        looked = self.look(token, *(choice if is_known else AT_FIRST))
        listed = self.conditions(choice[0], "", visitor, project_key, request, token) if is_known else (*UNCHANGED, "")
        return visitor, welcome, project_key, *choice, *looked, seeds, *listed

    def search(self, typed: str, seen: list[tuple[str, str]]) -> tuple:
        """Choices for what is typed, then those seen before; a choice made before stands in the field too, and is no search.

        A name that is typed to its end comes first, as it would while it is typed: Enter and a quick click take the first.

        The list never becomes shorter: Gradio draws the new one with the rows of the old one, and breaks off if one is gone.
        """
        offered = self.studio.catalog.offered()
        is_shown = any(typed == shown for shown, _ in offered)
        in_full = sorted(offered, key=lambda choice: choice[0] != typed)
        found, is_heard = (in_full, True) if is_shown else self.studio.catalog.search(typed)
        choices = (found + [choice for choice in seen if choice not in found])[:CHOICES]
        return gr.Dropdown(choices=choices, info="" if is_heard else HUB_IS_SILENT), choices

    def look(self, token: gr.OAuthToken | None, *values: Any) -> tuple[str, str]:
        """The card, and the same thing as a command."""
        try:
            choice = Choice(*values)
            card = self.studio.chosen(choice, secret(token))
            costs = self.studio.costs(card, choice)
        except Exception as error:
            return html.trouble(explain(error)), ""
        shown = card_html.card(choice.model, card, costs, int(choice.bits), self.studio.device)
        return shown, command(choice)

    def link(
        self, listed: str, classes: list[int] | None, prompts: str, seeds: int | float, guidance: str, *values: Any
    ) -> str:
        """All that is chosen as a link, with what shall be drawn where those fields are of the chosen model."""
        try:
            choice = Choice(*values)
            settings = choice.settings()
        except ValueError:  # the card says what is wrong
            return ""
        drawn = fields.in_link(classes, prompts, seeds, guidance) if listed == choice.model else {}
        link = links.link_of(choice.model, settings, choice.components, drawn)
        told = html.note(TOO_LONG) if "prompts" in drawn and "&prompts=" not in link else ""
        return html.copyable("Link to these settings", link, "link") + told if choice.model else ""

    def conditions(
        self, model: str, listed: str, key: str, project_key: str, request: gr.Request, token: gr.OAuthToken | None
    ) -> tuple:
        """What can be drawn, of the job's model, or without a job of the chosen one: classes or prompts, and a guidance.

        At first those of the link, else a few; `listed` is the model of those that stand there. A model that arrives with its
        classes is also a change of the model, which asks again: what was chosen stays.
        """
        project = self.studio.found(key, project_key)
        model = project.model if project else model
        try:
            card = self.studio.card(model, token=secret(token))
        except Exception:  # the card says what is wrong
            return (*UNCHANGED, listed) if model == listed else (*fields.hidden(), "")
        call = project.settings.call_arguments if project else {}
        if model == listed:
            return gr.skip(), gr.skip(), fields.guidance(card, call, {}), listed
        asked = links.understood(links.asked(request))
        link = asked if asked.get("model") == model else {}
        return fields.classes(card, link), fields.prompts(card, link), fields.guidance(card, call, link), model

    def offer(self, model: str, components: Components) -> gr.Radio:
        """Parts can be fetched from the original only where it is a repository on the Hub."""
        is_there = self.studio.catalog.is_on_the_hub(model or "")
        return gr.Radio(value=components if is_there else "copy", interactive=is_there)

    def suggest(self, model: str) -> str:
        """Arguments of the call for a model that somebody picked."""
        return links.suggested(model)

    # --- running ---

    def begin(self, key: str, turn: int, token: gr.OAuthToken | None, *values: Any) -> tuple:
        visitor = self.studio.workspace.visitor(key)
        try:
            project = self.studio.begin(visitor, Choice(*values), secret(token))
            if project.status().phase == "done":
                bar, *rest = self.view(project)
                return bar + html.note(MADE_ALREADY), *rest, visitor, project.key, turn
            self.studio.line_up(project, secret(token))
        except Exception as error:
            return *idle(html.trouble(explain(error))), visitor, gr.skip(), turn  # without a key it would be the last job
        return *self.view(project), visitor, project.key, turn + 1

    def resume(self, key: str, project_key: str, turn: int, token: gr.OAuthToken | None = None) -> tuple:
        try:
            project = self.studio.project(key, project_key)
        except Exception as error:
            return *idle(html.trouble(explain(error))), turn
        try:
            self.studio.line_up(project, secret(token))
        except Exception as error:
            return *self.view(project, explain(error)), turn
        return *self.view(project), turn + 1

    def stop(self, key: str, project_key: str) -> tuple:
        """Ask the worker to stop; if the job only waits for its turn, it is paused at once.

        While somebody works, the stream of that work tells the rest: an answer from here might arrive after its last
        word, and hide how it ended.
        """
        try:
            project = self.studio.project(key, project_key)
            project.ask_to_stop()
        except Exception as error:  # another tab has deleted it
            return idle(html.trouble(explain(error)))
        if project.is_busy():
            return (gr.skip(),) * 7
        if project.status().phase in ("new", "queued", "waiting"):
            project.set_status(replace(project.status(), phase="paused", message="You stopped it before its turn came."))
        self.studio.drop(project)
        return self.view(project)

    def quantize(self, key: str, project_key: str, turn: int, token: gr.OAuthToken | None = None) -> Iterator[tuple]:
        """The work, streamed: to its end, or under ZeroGPU for one time slice, which a new one follows if time ran out."""
        try:
            project = self.studio.project(key, project_key)
        except Exception as error:
            yield *idle(html.trouble(explain(error))), gr.skip()
            return
        found = None
        for found in self.studio.quantize(project, secret(token)):
            yield *self.view(project, found), gr.skip()
        goes_on = project.status().phase == "waiting" and found is None and not self.studio.queue
        yield *self.view(project, found), turn + 1 if goes_on else gr.skip()

    def watch(self, key: str, project_key: str, turn: int, token: gr.OAuthToken | None = None) -> Iterator[tuple]:
        """After a reload: look on at work that goes on, and go on with what waits for somebody to do so."""
        try:
            project = self.studio.project(key, project_key)
        except Exception:  # nothing runs, and the page says so; an answer might overtake that of a first click
            yield (gr.skip(),) * 8  # a stream without a word would empty what it feeds, labels of buttons included
            return
        for _ in self.studio.until_free(project) if not self.studio.queue else ():  # a lease that a closed page has left
            yield *self.view(project), gr.skip()
        found = None
        try:
            if project.status().phase == "waiting":
                self.studio.line_up(project, secret(token))
        except Exception as error:
            found = explain(error)
        yield *self.view(project, found), turn + 1 if project.status().is_under_way and not found else gr.skip()

    def view(self, project: Project, found: Trouble | None = None) -> tuple:
        """All that the run step shows of a project, from its folder."""
        status, events, layers = project.status(), project.events(), project.layers()
        left = time_left(project, status, self.studio.time_slice) if status.is_under_way else None
        place = self.studio.place(project) if status.is_under_way else None
        bar = html.progress(project, status, events, left, place)
        if found or status.phase in ("paused", "failed"):
            next_step = status.next_step or (RESUME if status.phase == "paused" else "")  # what failed says what can help
            told = found or in_words(PAUSES[status.phase], status.message, next_step, status.details)
            bar += html.trouble(told, is_asked_for=status.phase == "paused" and project.is_asked_to_stop())
        working = status.is_under_way
        if working and project.is_asked_to_stop():
            bar += html.note("Stopping after this piece …")
        paused = status.phase in PAUSES
        begin = gr.Button(visible=not working, variant="secondary" if paused else "primary")
        buttons = begin, gr.Button(visible=working), gr.Button(visible=paused)
        return (
            bar,
            charts.chart(layers, project.forecast().num_blocks, events, project.settings.recipe),
            html.layers_table(layers),
            html.log(events),
            *buttons,
        )

    # --- keeping ---

    def download(self, key: str, project_key: str) -> tuple:
        try:
            project = self.studio.project(key, project_key)
            path = self.studio.download(project)
        except Exception as error:
            return gr.skip(), html.trouble(explain(error))
        label = f"Download {path.name} ({size(path.stat().st_size)})"
        return gr.DownloadButton(label, value=str(path), visible=True), html.load_snippet(path.stem, project.components)


UNCHANGED = (gr.skip(),) * 3
MADE_ALREADY = "It was made before, with these settings: there is nothing to do."
AT_FIRST = (BUNDLED, 2, "best", 0, "", "", "copy")
HUB_IS_SILENT = "The Hub does not answer: only what is known here is listed. A full name, owner/name, can be tried."
TOO_LONG = "The prompts make the link too long for some programs: it says all but them."
CHOICES = 100  # as many as Gradio shows
PAUSES = {"paused": "The job is paused", "failed": "The job could not go on"}
RESUME = "Press Resume to go on; it ends in the same bytes."


def secret(token: gr.OAuthToken | None) -> str | None:
    """What the Hub takes; None is nobody, or on one's own machine its own login."""
    return token.token if token else None


def idle(message: str) -> tuple:
    """The run step when no work can be shown."""
    keep = (gr.skip(),) * 3
    return message, *keep, gr.Button(visible=True), gr.Button(visible=False), gr.Button(visible=False)


def greeting(last: Project) -> str:
    status: Status = last.status()
    return html.welcome(last.title, html.PHASES[status.phase].lower())


def command(choice: Choice) -> str:
    """The same thing in a terminal. Where folders of the server lie is not for every visitor to know."""
    settings, label, model = choice.settings(), "The same in a terminal", choice.model
    if model.startswith(FOLDER):
        label, model = f"{label}; ROOT is the folder given to --root", f"ROOT/{model.removeprefix(FOLDER)}"
    output = f"{re.split('[/:]', choice.model)[-1]}-{settings.bits}bit"
    return html.copyable(label, html.command_of(model, settings, output, choice.components), "command")
