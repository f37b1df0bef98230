"""The event handlers of the compare step: pictures pair by pair, and the blind test."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from vq4dit.printable import printable
from vq4dit.projects.drawn_pairs import Pair, drawn_pairs, measuring, report, why_not_drawn
from vq4dit.projects.pair_settings import PairSettings
from vq4dit.projects.project import Project
from vq4dit.web import html, pictures
from vq4dit.web.answers import secret
from vq4dit.web.messages import Trouble, explain, in_words
from vq4dit.web.studio import Studio

SAME = (gr.skip(),) * 8  # the pictures stay: they are large, and sent only when there is a new one
NOTHING_YET = "When a model is packed, its pictures appear here beside the original's."
NO_PAIRS = "Draw some pairs first."


class CompareAnswers:
    """One method per event; the pictures themselves are files of the project."""

    def __init__(self, studio: Studio):
        self.studio = studio

    # --- drawing ---

    def begin_drawing(
        self,
        key: str,
        project_key: str,
        drawing: int,
        classes: Sequence[int] = (),
        seeds: int | float = 1,
        prompts: str = "",
        guidance: str = "",
        token: gr.OAuthToken | None = None,
    ) -> tuple:
        try:
            project = self.studio.project(key, project_key)
            if project.status().phase != "done":
                return html.empty("Quantize the model first: there is nothing to compare yet."), gr.skip(), drawing
            settings = PairSettings.of(project, classes, prompts, int(seeds), guidance)
            self.studio.line_up_drawing(project, settings, secret(token))
        except Exception as error:
            return html.trouble(explain(error)), gr.skip(), drawing
        return html.note("Your pictures are in the queue."), gr.Button(visible=True), drawing + 1

    def halt(self, key: str, project_key: str) -> None:
        """Ask to stop; the drawing's own stream tells the rest: an answer from here might arrive after its last word."""
        project = self.studio.found(key, project_key)
        if project is not None:
            project.ask_to_stop()
            self.studio.drop(project)

    def draw(
        self,
        key: str,
        project_key: str,
        drawing: int,
        classes: Sequence[int],
        seeds: int | float,
        token: gr.OAuthToken | None = None,
        prompts: str = "",
        guidance: str = "",
    ) -> Iterator[tuple]:
        """The drawing, streamed: to its end, or under ZeroGPU for one time slice, which a new one follows if time ran out."""
        try:
            project = self.studio.project(key, project_key)
            settings = self.studio.drawing(project) or PairSettings.of(project, classes, prompts, int(seeds), guidance)
        except Exception as error:
            yield html.trouble(explain(error)), *SAME, gr.Button(visible=False), gr.skip()
            return
        found, on_page = None, list[Pair]()
        for trouble in self.studio.draw(project, settings, secret(token)):
            found = trouble or found
            settings = self.studio.drawing(project) or settings  # what is wanted may be more meanwhile
            pairs = drawn_pairs(project)
            shown = self.shown(key, project, pairs, on_page) if on_page != pairs else SAME
            on_page = pairs
            place = self.studio.place(project)
            told = html.note(html.turn_comes(place)) if place else counted(project, settings, working=True)
            yield told, *shown, gr.Button(visible=True), gr.skip()
        found = found or not_drawn(project)
        is_over = self.studio.queue is not None or found is not None or project.is_asked_to_stop()
        finished = is_over or self.studio.is_drawn(project, settings)
        told = html.trouble(found) if found else counted(project, settings, working=not finished)
        shown = self.shown(key, project, drawn_pairs(project), on_page)
        yield told, *shown, gr.Button(visible=not finished), gr.skip() if finished else drawing + 1

    def watch(self, key: str, project_key: str, drawing: int) -> Any:
        """After a reload, or when the page comes back to a job: look on at pairs that are drawn."""
        project = self.studio.found(key, project_key) if project_key else None
        return drawing + 1 if project and self.studio.drawing(project) else gr.skip()

    def of_job(self, key: str, project_key: str) -> tuple:
        """The compare step, as the project's folder has it: of the job before nothing stays."""
        nothing = html.empty(NOTHING_YET), *nothing_drawn()
        try:
            project = self.studio.found(key, project_key) if project_key else None
            return self._drawn_of(key, project) if project else nothing
        except OSError:  # another tab has just deleted it
            return nothing

    def _drawn_of(self, key: str, project: Project) -> tuple:
        """A line, and what is shown of its pairs."""
        pairs, told = drawn_pairs(project), html.empty(NOTHING_YET)
        if found := not_drawn(project):
            told = html.trouble(found)
        elif pairs:
            told = html.note(f"{project.title}: {_counted(len(pairs))}")
        elif project.status().phase == "done":
            told = html.empty(f"{project.title} is packed. Press Draw pairs to see its pictures beside the original's.")
        return told, *self.shown(key, project, pairs)

    def shown(self, key: str, project: Project, pairs: list[Pair], on_page: Sequence[Pair] = ()) -> tuple:
        """Chips, slider, figures, grid, widths; blind test, its score and state, which begin anew with other pairs.

        If no pair of the page is gone, the chosen one and its line stay.
        """
        if not pairs:
            return nothing_drawn()
        chips, first = [(printable(f"{pictures.short(p.name)} · {p.seed}"), p.stem) for p in pairs], pairs[0]
        chosen = gr.Radio(chips, value=first.stem, visible=True), pictures.slider(project, first)
        if on_page and all(pair in pairs for pair in on_page):
            chosen = gr.Radio(chips), gr.skip()
        same = [p for p in self.studio.workspace.projects(key) if pictures.draws_alike(p, project)]
        figures = pictures.figures(report(project), pairs)
        new_game: tuple = html.empty("Press Next pair, then say which one is the original."), "", {}
        game = (gr.skip(),) * 3 if on_page else new_game
        return *chosen, figures, pictures.grid(project, pairs), pictures.widths(same), *game

    def show(self, key: str, project_key: str, stem: str) -> str:
        project = self.studio.project(key, project_key)
        return next((pictures.slider(project, pair) for pair in drawn_pairs(project) if pair.stem == stem), "")

    # --- the blind test ---

    def deal(self, key: str, project_key: str, game: dict) -> tuple:
        """A pair in an order that only the server knows."""
        try:
            project = self.studio.project(key, project_key)
        except Exception as error:
            return html.trouble(explain(error)), "", game
        pairs = drawn_pairs(project)
        if not pairs:
            return html.empty(NO_PAIRS), "", game
        pair = random.choice(pairs)
        game = game | {"job": project.key, "pair": pair.stem, "left": random.random() < 0.5, "open": True}
        return pictures.blind(project, pair, game["left"], False), html.score(game), game

    def guess(self, key: str, project_key: str, game: dict, left: bool) -> tuple:
        project = self.studio.found(key, project_key)
        if project is None or game.get("job") != project.key:
            return self.deal(key, project_key, {})
        if not game["open"]:
            return self.deal(key, project_key, game)
        pairs = drawn_pairs(project)
        pair = next((pair for pair in pairs if pair.stem == game["pair"]), None)
        if pair is None:  # drawn anew meanwhile
            return self.deal(key, project_key, game)
        right = int(game["left"] == left)
        game = game | {"open": False, "right": game.get("right", 0) + right, "total": game.get("total", 0) + 1, "was": right}
        return pictures.blind(project, pair, game["left"], True), html.score(game), game

    def guess_left(self, key: str, project_key: str, game: dict) -> tuple:
        return self.guess(key, project_key, game, True)

    def guess_right(self, key: str, project_key: str, game: dict) -> tuple:
        return self.guess(key, project_key, game, False)


def nothing_drawn() -> tuple:
    """The same of a job without pictures."""
    empties = (html.empty(words) for words in (pictures.NO_GRID, pictures.NO_WIDTHS, NO_PAIRS))
    return gr.Radio(visible=False), "", "", *empties, "", {}


def counted(project: Project, settings: PairSettings, *, working: bool) -> str:
    """How far the drawing came."""
    wanted = settings.wanted()
    done = sum(pair.key in wanted for pair in drawn_pairs(project))
    stopped = project.is_asked_to_stop() and report(project) is None
    told = f"{done} of {_counted(len(wanted))}" if done < len(wanted) else _counted(done)
    if stopped and not working:
        return html.note(f"You stopped it: {told}. Press Draw pairs to go on.")
    if working:
        told = f"Drawing: {told}" if done < len(wanted) else f"{told}, {_measuring(project)}"
        return html.note(f"{told}, stopping …" if stopped else f"{told} …")
    return html.note(told)


def not_drawn(project: Project) -> Trouble | None:
    """Why the last drawing failed, in words."""
    status = why_not_drawn(project)
    return in_words("The pairs could not be drawn", status.message, status.next_step, status.details) if status else None


def _measuring(project: Project) -> str:
    steps = measuring(project)
    return f"measuring the noise: step {steps[0]} of {steps[1]}" if steps else "measuring the noise"


def _counted(pairs: int) -> str:
    return f"{pairs} pair" if pairs == 1 else f"{pairs} pairs"
