"""The page: five steps from top to bottom, and which event leads to which answer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from vq4dit.bundled import BUNDLED
from vq4dit.config import RECIPES
from vq4dit.web import charts, fields, html, pictures
from vq4dit.web.answers import Answers
from vq4dit.web.choice import widths_offered
from vq4dit.web.compare_answers import NO_PAIRS, NOTHING_YET, CompareAnswers
from vq4dit.web.endpoints import Endpoints
from vq4dit.web.jobs_panel import JobsPanel
from vq4dit.web.push_panel import Login, PushPanel
from vq4dit.web.studio import QUEUE_LENGTH, Studio

# Pages that look on at the same time: each takes a thread, which mostly sleeps; some are left for all else.
MOST_LOOKING, MOST_THREADS = 150, 200
# A dropdown's value changes only when something is chosen; who comes to type replaces what stands there.
TYPED = "(_, seen) => [document.querySelector('#model input').value, seen]"
SELECT = "() => document.querySelector('#model input').select()"
WAYS = [("copied into the result", "copy"), ("fetched from the original by whoever loads it", "reference")]
RECIPE_WORDS = {"best": "best measured", "paper": "as VQ4DiT published it", "kmeans": "codebooks only, fastest"}


class Page:
    """The components, by what they are for, and the wiring between them."""

    def __init__(self, studio: Studio, picture: Path, login: Login = "none"):
        self.studio, self.login = studio, login
        self.answers, self.compare = Answers(studio), CompareAnswers(studio)
        with gr.Blocks(title="vq4dit", analytics_enabled=False, delete_cache=(1800, 7200)) as self.blocks:
            self.visitor = gr.BrowserState("", storage_key="vq4dit-visitor", secret="vq4dit")
            self.project, self.turn, self.drawing = gr.State(""), gr.State(0), gr.State(0)
            self.game, self.listed = gr.State({}), gr.State("")
            gr.HTML(html.hero(picture), elem_id="hero")
            self.welcome = gr.HTML(elem_id="welcome", visible=False)
            self.nudge = gr.Button(elem_id="nudge", visible="hidden")
            self._pick()
            self._choose()
            self._run()
            self._compare()
            self._keep()
            self._wire()
        self.blocks.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=8)

    # --- layout ---

    def _pick(self) -> None:
        with gr.Column(elem_classes="step", elem_id="pick"):
            gr.HTML(html.heading(1, "Pick a model", "Type to search the Hugging Face Hub. Only headers are read here."))
            self.model = gr.Dropdown(
                self.studio.catalog.offered(),
                value=BUNDLED,
                allow_custom_value=True,
                label="Model",
                elem_id="model",
            )
            self.card = gr.HTML(html.empty("What there is to know about the model appears here."), elem_id="card")

    def _choose(self) -> None:
        with gr.Column(elem_classes="step", elem_id="choose"):
            gr.HTML(html.heading(2, "Choose how small", "Two bits is where it gets interesting; four is nearly the original."))
            with gr.Row():
                with gr.Column(scale=3):
                    self.bits = gr.Radio(widths_offered(), value=2, label="Bits per weight", elem_id="bits")
                    recipes = [(f"{name} · {RECIPE_WORDS[name]}", name) for name in RECIPES]
                    self.recipe = gr.Radio(recipes, value="best", label="Recipe", elem_id="recipe")
                with gr.Column(scale=2):
                    self.seed = gr.Number(0, label="Seed", elem_id="seed")  # what is no seed is told in words
                    with gr.Accordion("Advanced", open=False, elem_id="advanced-box"):
                        self.keep = gr.Textbox(
                            "",
                            label="Layers to keep in 16 bit: patterns of names, separated by spaces",
                            placeholder="*.ff.*  transformer_blocks.0.*",
                            elem_id="keep",
                        )
                        self.call = gr.Textbox(
                            "",
                            label="Arguments of the pipeline's call, to calibrate and to draw with: NAME=VALUE, one a line",
                            placeholder="guidance_scale=3",
                            lines=3,
                            max_lines=8,
                            elem_id="call",
                        )
                        self.components = gr.Radio(
                            WAYS,
                            value="copy",
                            interactive=False,  # until the model is one of the Hub
                            label="Text encoders, VAE and the like",
                            info="Of models on the Hub, a small result can fetch them from the original, at this commit.",
                            elem_id="components",
                        )
            self.command = gr.HTML(elem_id="command-box")
            self.link = gr.HTML(elem_id="link-box")

    def _run(self) -> None:
        with gr.Column(elem_classes="step", elem_id="run"):
            away = "You may close this page: the work goes on." if self.studio.queue else "Who closes the page goes on later."
            told = f"Stop whenever you like: every finished layer is kept. {away} One job at a time, up to {QUEUE_LENGTH} wait."
            gr.HTML(html.heading(3, "Watch it shrink", told))
            with gr.Row(elem_classes="buttons"):
                self.start = gr.Button("Quantize", variant="primary", interactive=False, elem_id="start")
                self.stop = gr.Button("Stop", elem_id="stop", visible=False)
                self.resume = gr.Button("Resume", variant="primary", elem_id="resume", visible=False)
            self.progress = gr.HTML(html.empty("Nothing runs yet."), elem_id="progress")
            self.chart = gr.HTML(charts.chart([], 0, []), elem_id="chart")
            with gr.Accordion("Finished layers", open=False, elem_id="layers-box"):
                self.layers = gr.HTML(html.layers_table([]), elem_id="layers")
            with gr.Accordion("Log", open=False, elem_id="log-box"):
                self.log = gr.HTML(html.log([]), elem_id="log")
            self.jobs = JobsPanel(self.answers)

    def _compare(self) -> None:
        with gr.Column(elem_classes="step", elem_id="compare"):
            gr.HTML(
                html.heading(4, "Compare", "Same subject and noise, through both models. Drag the line, or use the arrow keys.")
            )
            with gr.Row():
                self.labels = gr.Dropdown(
                    [], multiselect=True, max_choices=fields.MOST_CLASSES, label="Classes", elem_id="labels", scale=3
                )
                self.prompts = gr.Textbox(
                    "", label="Prompts, one a line", lines=3, max_lines=12, visible=False, elem_id="prompts", scale=3
                )
                self.guidance = gr.Textbox("", label="Guidance", max_lines=1, visible=False, elem_id="guidance", scale=1)
                numbers = list(range(1, fields.MOST_SEEDS + 1))
                self.seeds = gr.Radio(numbers, value=1, label="Seeds of each", elem_id="seeds", scale=1)
            with gr.Row(elem_classes="buttons"):
                self.draw = gr.Button("Draw pairs", variant="primary", elem_id="draw")
                self.halt = gr.Button("Stop drawing", elem_id="halt", visible=False)
            self.drawn = gr.HTML(html.empty(NOTHING_YET), elem_id="drawn")
            self.pair = gr.Radio([], label="Pair", elem_id="pair", visible=False)
            self.slider = gr.HTML(elem_id="slider-box")
            self.figures = gr.HTML(elem_id="figures")
            with gr.Accordion("All pairs", open=False, elem_id="grid-box"):
                self.grid = gr.HTML(html.empty(pictures.NO_GRID), elem_id="grid")
            with gr.Accordion("Blind test: which one is the original?", open=False, elem_id="blind-box"):
                self.blind = gr.HTML(html.empty(NO_PAIRS), elem_id="blind")
                with gr.Row(elem_classes="buttons"):
                    self.left = gr.Button("Left is the original", elem_id="guess-left")
                    self.right = gr.Button("Right is the original", elem_id="guess-right")
                    self.another = gr.Button("Next pair", elem_id="another")
                self.score = gr.HTML(elem_id="score")
            with gr.Accordion("All widths you have made", open=False, elem_id="widths-box"):
                self.widths = gr.HTML(html.empty(pictures.NO_WIDTHS), elem_id="widths")

    def _keep(self) -> None:
        with gr.Column(elem_classes="step", elem_id="keep-it"):
            gr.HTML(html.heading(5, "Keep it", "A folder that diffusers loads with one more import, and the report beside it."))
            with gr.Row(elem_classes="buttons"):
                self.prepare = gr.Button("Prepare the download", elem_id="prepare")
                self.file = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="download")
            self.kept = gr.HTML(elem_id="kept")
            self.push = PushPanel(self.studio, self.login)

    # --- wiring ---

    def _wire(self) -> None:
        self.choice: list[Any] = [self.model, self.bits, self.recipe, self.seed, self.keep, self.call, self.components]
        self.looked = [self.card, self.command]
        self.asked = [self.model, self.listed, self.visitor, self.project]
        self.conditions = [self.labels, self.prompts, self.guidance, self.listed]
        self.run_view = [self.progress, self.chart, self.layers, self.log, self.start, self.stop, self.resume]
        self.guessed = [self.blind, self.score, self.game]
        self.drawn_view = [self.drawn, self.pair, self.slider, self.figures, self.grid, self.widths, *self.guessed]
        self.job = [self.visitor, self.project]
        # Under ZeroGPU the work is in these events, one at a time; else they only look on, as many as come.
        gpu: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1, "show_progress": "minimal"}
        looking: dict[str, Any] = {"concurrency_id": "looking", "concurrency_limit": MOST_LOOKING}
        self.streams = looking if self.studio.queue else gpu

        arrived = self._wire_arrival()
        self._wire_choice()
        started, worked = self._wire_run()
        self._wire_compare(worked)
        self._wire_keep(arrived, started, worked)
        self.on(self.nudge.click, lambda: None, [], [], trigger_mode="multiple")
        endpoints = Endpoints(self.studio)
        gr.api(endpoints.inspect, api_name="inspect")
        gr.api(endpoints.estimate, api_name="estimate")

    def _wire_arrival(self) -> Any:
        answers = self.answers
        restored = [self.visitor, self.welcome, self.project, *self.choice, *self.looked, self.seeds, *self.conditions]
        arrived = self.on(self.blocks.load, answers.arrive, [self.visitor], restored)
        # Earlier than what a link asks for, a click would start what the page shows at first.
        arrived.then(**self.private(lambda: gr.Button(interactive=True), [], [self.start]))
        arrived.then(**self.private(answers.conditions, self.asked, self.conditions))
        arrived.then(**self.private(answers.watch, [*self.job, self.turn], [*self.run_view, self.turn]))
        return arrived

    def _wire_choice(self) -> None:
        answers = self.answers
        one_by_one: dict[str, Any] = {"trigger_mode": "always_last"}  # so that no older answer arrives after a newer one
        seen = gr.State(self.studio.catalog.offered())
        self.on(self.model.focus, None, [], [], js=SELECT)
        self.on(self.model.key_up, answers.search, [self.model, seen], [self.model, seen], js=TYPED, queue=False, **one_by_one)
        changes = partial(gr.on, [control.change for control in self.choice])
        self.on(changes, answers.look, self.choice, self.looked, **one_by_one)
        linked = [self.listed, self.labels, self.prompts, self.seeds, self.guidance, *self.choice]
        follows = partial(gr.on, [control.change for control in linked])
        self.on(follows, answers.link, linked, [self.link], **one_by_one)
        self.on(self.model.change, answers.conditions, self.asked, self.conditions, **one_by_one)
        self.on(self.model.change, answers.offer, [self.model, self.components], [self.components], **one_by_one)
        self.on(self.model.input, answers.suggest, [self.model], [self.call], **one_by_one)

    def _wire_run(self) -> tuple[Any, Any]:
        """The events after a press of Quantize, and after work."""
        answers, job_and_turn, view = self.answers, [*self.job, self.turn], [*self.run_view, self.turn]
        begun = [*self.run_view, self.visitor, self.project, self.turn]
        started = self.on(self.start.click, answers.begin, [self.visitor, self.turn, *self.choice], begun)
        started.then(**self.private(answers.conditions, self.asked, self.conditions))
        self.on(self.resume.click, answers.resume, job_and_turn, view)
        presses = partial(gr.on, [self.start.click, self.resume.click, self.jobs.went.change])  # what it says is then over
        self.on(presses, lambda: gr.HTML(visible=False), [], [self.welcome], queue=False)
        self.on(self.stop.click, answers.stop, self.job, self.run_view, queue=False)
        return started, self.on(self.turn.change, answers.quantize, job_and_turn, view, **self.streams)

    def _wire_compare(self, worked: Any) -> None:
        compare, job = self.compare, self.job
        of_job = self.private(compare.of_job, job, self.drawn_view)
        worked.then(**of_job)
        drawing = [*job, self.drawing, self.labels, self.seeds, self.prompts, self.guidance]
        self.on(self.draw.click, compare.begin_drawing, drawing, [self.drawn, self.halt, self.drawing])
        self.on(self.halt.click, compare.halt, job, [], queue=False)
        drawn_view = [*self.drawn_view, self.halt, self.drawing]
        drawn = self.on(self.drawing.change, compare.draw, drawing, drawn_view, **self.streams)
        looked_up = self.project.change(**of_job, cancels=[drawn])
        looked_up.then(**self.private(compare.watch, [*job, self.drawing], [self.drawing]))
        # What was prepared or is being drawn is of the job before; after more work on the same job it may be new.
        gone = lambda: (gr.Button(visible=False), gr.DownloadButton(visible=False), "")  # noqa: E731
        self.on(self.project.change, gone, [], [self.halt, self.file, self.kept], queue=False)
        self.on(self.pair.input, compare.show, [*job, self.pair], [self.slider])

        self.on(self.another.click, compare.deal, [*job, self.game], self.guessed)
        self.on(self.left.click, compare.guess_left, [*job, self.game], self.guessed)
        self.on(self.right.click, compare.guess_right, [*job, self.game], self.guessed)

    def _wire_keep(self, arrived: Any, started: Any, worked: Any) -> None:
        answers, job = self.answers, self.job
        self.on(self.prepare.click, answers.download, job, [self.file, self.kept])
        names = ("model", "bits", "recipe", "seed", "keep", "call", "components", "classes", "prompts", "seeds", "guidance")
        settings = dict(zip(names, (*self.choice, self.labels, self.prompts, self.seeds, self.guidance), strict=True))
        self.jobs.wire(job, [self.project, *self.choice, *self.run_view], [arrived, started], worked)
        went = self.on(self.jobs.went.change, answers.conditions, self.asked, self.conditions)
        went.then(**self.private(answers.watch, [*job, self.turn], [*self.run_view, self.turn]))
        self.push.wire(job, settings, arrived, [started, worked, went])

    @staticmethod
    def private(function: Any, inputs: list, outputs: list) -> dict[str, Any]:
        """Arguments of an event that no API shows."""
        return {"fn": function, "inputs": inputs, "outputs": outputs, "api_visibility": "private", "show_progress": "hidden"}

    @classmethod
    def on(cls, event: Any, function: Any, inputs: list, outputs: list, **settings: Any) -> Any:
        return event(**(cls.private(function, inputs, outputs) | settings))
