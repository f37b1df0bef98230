"""The part of the page that lists a visitor's jobs, so that none is lost: to show one again, go on with it, or delete it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vq4dit.disk.space import folder_bytes
from vq4dit.errors import JobError
from vq4dit.projects.workspace import Project
from vq4dit.web import html, links
from vq4dit.web.answers import Answers
from vq4dit.web.messages import explain, size

NONE_YET = "Each model you quantize is listed here, with what it takes on the server's disk."
QUESTION = "Delete this job, and all that was made in it?"
CONFIRMED = f"(...given) => confirm('{QUESTION}') ? given : [given[0], given[1], null]"


class JobAnswers:
    """One method per event."""

    def __init__(self, answers: Answers):
        self.answers, self.studio = answers, answers.studio

    def listed(self, key: str, project_key: str) -> tuple:
        """All jobs of this visitor, the shown one chosen."""
        own = self.studio.workspace.projects(self.studio.workspace.visitor(key))
        jobs = [(line(project), project.key) for project in own]
        is_there = bool(own)
        buttons = gr.Button(visible=is_there), gr.Button(visible=is_there)
        chosen = project_key if project_key in {project.key for project in own} else None
        return gr.Radio(jobs, value=chosen, visible=is_there), *buttons, "" if is_there else html.empty(NONE_YET)

    def show(self, key: str, project_key: str, chosen: str | None) -> tuple:
        """Go to a job: its key, its settings, its run step."""
        try:
            if not chosen:
                raise ValueError("a job is needed, and none is chosen: choose one of the list")
            now = self.studio.found(key, project_key) if project_key else None
            if now and now.key != chosen and now.status().phase in ("running", "waiting"):
                raise JobError(f"this page follows {now.title}, which is at work: stop it first, or open a second tab")
            return "", *self._shown(self.studio.project(key, chosen))
        except Exception as error:
            return html.trouble(explain(error)), *UNCHANGED

    def delete(self, key: str, project_key: str, chosen: str | None) -> tuple:
        """Delete a job. If it is the one that the page shows, the newest of the others takes its place."""
        if chosen is None:
            return "", *UNCHANGED
        try:
            self.studio.workspace.remove(self.studio.project(key, chosen))
        except Exception as error:
            return html.trouble(explain(error)), *UNCHANGED
        if chosen != project_key:
            return "", *UNCHANGED
        own = self.studio.workspace.projects(key)
        return "", *(self._shown(own[0]) if own else NOTHING)

    def _shown(self, project: Project) -> tuple:
        return project.key, *links.chosen({}, project), *self.answers.view(project)


def line(project: Project) -> str:
    """A job in one line."""
    phase = html.PHASES[project.status().phase].lower()
    return f"{project.title} · {phase} · {size(folder_bytes(project.folder))}"


UNCHANGED = (gr.skip(),) * 15  # of project, choice and run step
NOTHING = (
    "",
    *(gr.skip(),) * 7,
    html.empty("Nothing runs yet."),
    html.chart([], 0, []),
    html.layers_table([]),
    html.log([]),
    gr.Button(visible=True, variant="primary"),
    gr.Button(visible=False),
    gr.Button(visible=False),
)


class JobsPanel:
    """The components, inside the page's run step, and their wiring."""

    def __init__(self, answers: Answers):
        self.answers = JobAnswers(answers)
        with gr.Accordion("All your jobs", open=False, elem_id="jobs-box"):
            self.none = gr.HTML(html.empty(NONE_YET))
            self.jobs = gr.Radio([], label="Job", visible=False, elem_id="jobs")
            self.trouble = gr.HTML(elem_id="jobs-trouble")
            with gr.Row(elem_classes="buttons"):
                self.show = gr.Button("Show it", visible=False, elem_id="jobs-show")
                self.delete = gr.Button("Delete it", visible=False, elem_id="jobs-delete")

    def wire(self, job: list, shown: list, occasions: list[Any]) -> list[Any]:
        """List anew on the `occasions`; returns the events after which another job may be on the page.

        Args:
            job: visitor and project.
            shown: project, choice and run step.
        """
        answers, chosen = self.answers, [*job, self.jobs]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        went = self.show.click(answers.show, chosen, [self.trouble, *shown], **hidden)
        deleted = self.delete.click(answers.delete, chosen, [self.trouble, *shown], js=CONFIRMED, **hidden)
        for event in (*occasions, went, deleted):
            event.then(answers.listed, job, [self.jobs, self.show, self.delete, self.none], **hidden)
        return [went, deleted]
