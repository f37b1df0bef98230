"""What the page's events do: short answers over the library. One `Studio` serves all visitors and remembers none of them."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr

from vq4dit.config import CallValue, Recipe
from vq4dit.disk.job import TimeBudget
from vq4dit.disk.space import check_space
from vq4dit.errors import JobError, UnsupportedModelError, VQ4DiTError
from vq4dit.hub.account import Account
from vq4dit.models.conditions import condition_kind
from vq4dit.pipelines.references import check_base
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.projects.archive import pack
from vq4dit.projects.call_lines import check_fitting
from vq4dit.projects.catalog import Catalog, ModelCard
from vq4dit.projects.drawn_pairs import Drawing, draw, is_complete
from vq4dit.projects.pair_settings import PairSettings
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.project import Forecast, Project
from vq4dit.projects.publish import DownloadCheck
from vq4dit.projects.work_queue import Place, WorkQueue
from vq4dit.projects.worker import TICK_SECONDS, Quantization, stream, work
from vq4dit.projects.workspace import Workspace
from vq4dit.recipes.estimate import Device, Estimate, check_fits, estimate
from vq4dit.web import gpu
from vq4dit.web.choice import Choice
from vq4dit.web.messages import Trouble, explain

QUEUE_LENGTH, OF_EACH_VISITOR = 24, 6
MAX_AGE_SECONDS = 7 * 86400.0
MAX_TOTAL_BYTES = 20 * 10**9
CARDS_KEPT = 64


class Studio:
    """The library as the page needs it."""

    def __init__(self, catalog: Catalog, workspace: Workspace):
        self.catalog, self.workspace = catalog, workspace
        self.loader = Loader(catalog)
        # Under ZeroGPU each time slice is an event of the visitor's page, and Gradio's queue is the only one.
        self.queue = None if gpu.is_zero_gpu() else WorkQueue(gpu.slice_seconds(), QUEUE_LENGTH, OF_EACH_VISITOR)
        self.time_slice = math.inf if self.queue else gpu.slice_seconds()  # of the queue it ends only if others wait
        self.device: Device = "gpu" if gpu.is_zero_gpu() else "cpu"
        self.quantize_slice = gpu.on_gpu(self._quantize_slice)
        self.draw_slice = gpu.on_gpu(self._draw_slice)
        self._cards: dict[tuple, ModelCard] = {}

    # --- before the work ---

    def card(
        self,
        name: str,
        keep: tuple[str, ...] = (),
        recipe: Recipe = "best",
        token: str | None = None,
        call: tuple[tuple[str, CallValue], ...] = (),
    ) -> ModelCard:
        """What is known of a model. Read once and kept for all, but shown only to those who may read it themselves.

        Raises:
            VQ4DiTError: as `Catalog.card`.
        """
        self.catalog.check_access(name, token)
        key = name, self.catalog.revision(name, token), keep, recipe, call  # the same name may hold another model now
        if key not in self._cards:
            if len(self._cards) >= CARDS_KEPT:
                self._cards.clear()
            self._cards[key] = self.catalog.card(name, keep, recipe, token, dict(call))
        return self._cards[key]

    def chosen(self, choice: Choice, token: str | None = None) -> ModelCard:
        """The card of a choice whose settings fit its model.

        Raises:
            VQ4DiTError: as `Catalog.card`; if the recipe needs samples that this pipeline cannot make, or there is nothing to
                refer to. ValueError if the pipeline's call has no such argument.
        """
        settings = choice.settings()
        call = tuple(settings.call_arguments.items())
        card = self.card(choice.model, settings.keep, settings.recipe, token, call)
        pipeline = pipeline_class(card.pipeline)
        if settings.recipe != "kmeans":
            try:
                condition_kind(pipeline)
            except UnsupportedModelError as error:  # the recipe is what does not fit: another one takes this model
                raise VQ4DiTError(error.page) from error
        check_fitting(pipeline, settings.call_arguments)
        if choice.components == "reference":
            check_base(choice.model, card.commit if self.catalog.is_on_the_hub(choice.model) else None)
        return card

    def costs(self, card: ModelCard, choice: Choice) -> dict[int, Estimate]:
        """The estimate at each width, everything else as chosen."""
        costs = {}
        for prediction in card.inspection.predictions:
            settings = replace(choice, bits=prediction.bits).settings()
            costs[prediction.bits] = estimate(card.inspection, settings, self.device, choice.components)
        return costs

    def begin(self, visitor: str, choice: Choice, token: str | None = None) -> Project:
        """The project of a choice, with everything checked that can be checked before the work.

        Raises:
            VQ4DiTError: if the model or the settings are refused, or the disk is too full.
        """
        settings = choice.settings()
        card = self.chosen(choice, token)
        cost = self.costs(card, choice)[settings.bits]
        self.check_memory(cost, choice.model)
        self.workspace.sweep(max_age_seconds=MAX_AGE_SECONDS, max_bytes=MAX_TOTAL_BYTES)
        check_space(self.workspace.root, cost.disk_bytes + card.download_bytes)
        project = self.workspace.open(visitor, choice.model, settings, card.commit, choice.components)
        project.set_forecast(Forecast(card.inspection.num_blocks, cost.stages))
        return project

    def check_memory(self, cost: Estimate, model: str) -> None:
        """Raise `VQ4DiTError` if the work does not fit into memory, even without the pipelines that are kept for the next."""
        try:
            check_fits(cost, model)
        except VQ4DiTError:
            self.loader.forget()
            check_fits(cost, model)

    def project(self, visitor: object, key: str) -> Project:
        """A visitor's own project; without a key their last one, for a page that the restarted server does not know yet.

        Raises:
            JobError: if this visitor has none of that key: another's key opens nothing.
        """
        own = self.workspace.visitor(visitor)
        project = self.workspace.project(own, key) if key else next(iter(self.workspace.projects(own)), None)
        if project is None:
            raise JobError("there is no job here: choose a model and press Quantize")
        return project

    def found(self, visitor: object, key: str) -> Project | None:
        """The same, or None."""
        try:
            return self.project(visitor, key)
        except JobError:
            return None

    # --- the work: the server's own, at which pages look on, or under ZeroGPU that of a page's events, one time slice each ---

    def line_up(self, project: Project, token: str | None = None) -> None:
        """Let a project be worked on: by this server, or by the page's next events.

        Raises:
            JobError: if too many wait.
        """
        if project.status().phase in ("running", "done"):
            return
        if self.queue:
            self.queue.put(Quantization(project, self.loader.with_login(token)))
        else:
            project.forget_stop()
            project.set_status(replace(project.status(), phase="waiting"))

    def line_up_drawing(self, project: Project, settings: PairSettings, token: str | None = None) -> None:
        """The same for pairs to draw."""
        if self.queue:
            self.queue.put(Drawing(project, self.loader.with_login(token), settings))
        else:
            project.forget_stop()

    def quantize(self, project: Project, token: str | None = None) -> Iterator[Trouble | None]:
        """Look on at a project's work to its end, or work on it for a time slice; yields at least twice a second."""
        if self.queue:
            yield from _followed(self.queue, project)
            yield from self.until_free(project)
            return
        try:
            yield from self.quantize_slice(str(project.folder), token)
        except gr.Error as error:  # the scheduler's, not ours
            project.set_status(gpu.refused(error, project.status()))
            yield None

    def draw(self, project: Project, settings: PairSettings, token: str | None = None) -> Iterator[Trouble | None]:
        """The same of pairs."""
        if self.queue:
            yield from _followed(self.queue, project)
            return
        try:
            yield from self.draw_slice(str(project.folder), settings, token)
        except gr.Error as error:
            status = gpu.refused(error, project.status())
            yield Trouble(status.message, status.details, status.next_step)

    def until_free(self, project: Project) -> Iterator[None]:
        """Yield twice a second while somebody works on a project that this server does not: another one of this machine."""
        while project.status().phase in ("queued", "running") or project.is_busy():
            yield
            time.sleep(TICK_SECONDS)

    def check_download(self, project: Project, account: Account) -> Iterator[bool | None]:
        """Whether what was published draws the same image, after None twice a second.

        Raises:
            HubError: if the download fails; JobError if the queue is full.
        """
        task = DownloadCheck(project, account, [])
        if self.queue:
            entry = self.queue.put(task)
            yield from entry.follow()
            if entry.error:
                raise entry.error
            if not task.found:
                raise JobError("the check was taken out of the queue: press the button again")
        else:
            yield from stream(lambda check_stop: task.work(TimeBudget(None), check_stop))
        yield task.found[0]

    def drawing(self, project: Project) -> PairSettings | None:
        """The pairs that this server draws, or will draw, of a project."""
        entry = self.queue.find(project) if self.queue else None
        task = entry and (entry.next or entry.task)
        return task.settings if isinstance(task, Drawing) else None

    def place(self, project: Project) -> Place | None:
        """Where a project stands in the server's queue, if it waits there."""
        return self.queue.place(project) if self.queue else None

    def drop(self, project: Project) -> None:
        """Take a project out of the server's queue, if it waits there."""
        if self.queue:
            self.queue.drop(project)

    # --- the time slices of ZeroGPU: these two run in another process, and the login travels there in memory ---

    def _quantize_slice(self, folder: str, token: str | None) -> Iterator[Trouble | None]:
        try:
            yield from work(Project(Path(folder)), self.loader.with_login(token), gpu.slice_seconds())
        except Exception as error:
            yield explain(error)

    def _draw_slice(self, folder: str, settings: PairSettings, token: str | None) -> Iterator[Trouble | None]:
        try:
            yield from draw(Project(Path(folder)), self.loader.with_login(token), settings, gpu.slice_seconds())
        except Exception as error:
            yield explain(error)

    def is_drawn(self, project: Project, settings: PairSettings) -> bool:
        return is_complete(project, settings)

    # --- after the work ---

    def download(self, project: Project) -> Path:
        """One file, below a name nobody can guess, in the folder that Gradio serves and empties by itself."""
        root = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
        root.mkdir(parents=True, exist_ok=True)
        return pack(project, Path(tempfile.mkdtemp(dir=root)))


def _followed(queue: WorkQueue, project: Project) -> Iterator[Trouble | None]:
    if entry := queue.find(project):
        yield from entry.follow()
        if entry.error:
            yield explain(entry.error)
