"""The part of the page that lists a visitor's jobs, so that none is lost: to show one again, go on with it, or delete it."""

from __future__ import annotations

from typing import Any

import gradio as gr

from vq4dit.disk.space import folder_bytes
from vq4dit.errors import JobError
from vq4dit.printable import printable
from vq4dit.projects.call_lines import written
from vq4dit.projects.project import Project
from vq4dit.web import charts, html, links
from vq4dit.web.answers import Answers
from vq4dit.web.messages import explain, size

NONE_YET = "Each model you quantize is listed here, with what it takes on the server's disk."
# What the page adds to a click. It is at work while it waits in a queue, computes, draws or publishes: its streams would go on
# under another job.
AT_WORK, DECLINED = "at work", "declined"
BUTTONS = "[...document.querySelectorAll('#stop, #halt, #push-cancel')].some(button => button.offsetParent)"
SHOWN = f"(...given) => [...given.slice(0, -1), {BUTTONS} ? '{AT_WORK}' : '']"
CONFIRMED = f"""(...given) => {{
    const job = document.querySelector('#jobs input:checked')?.closest('label').innerText;
    const is_meant = !job || confirm(`Delete this job, and all that was made in it?\\n${{job}}`);
    return [...given.slice(0, -1), !is_meant ? '{DECLINED}' : {BUTTONS} ? '{AT_WORK}' : ''];
}}"""


class JobAnswers:
    """One method per event."""

    def __init__(self, answers: Answers):
        self.answers, self.studio = answers, answers.studio

    def listed(self, key: str, project_key: str, chosen: str | None = None) -> tuple:
        """All jobs of this visitor; what was chosen stays so, a later choice too, else the shown one is."""
        own = self.studio.workspace.projects(self.studio.workspace.visitor(key))
        lines = {project.key: told for project in own if (told := line(project))}
        jobs, is_there = [(told, key) for key, told in lines.items()], bool(lines)
        buttons = gr.Button(visible=is_there), gr.Button(visible=is_there)
        value: dict[str, Any] = {} if chosen in lines else {"value": project_key if project_key in lines else None}
        return gr.Radio(jobs, **value, visible=is_there), *buttons, "" if is_there else html.empty(NONE_YET)

    def show(self, key: str, project_key: str, chosen: str | None, went: int, added: str) -> tuple:
        """Go to a job: its key, its settings, its run step."""
        try:
            project, is_at_work = self._chosen(key, project_key, chosen, added)
            if is_at_work and project.key != project_key:
                raise JobError(PAGE_AT_WORK)
            return "", went + 1, *self._shown(project)
        except Exception as error:
            return html.trouble(explain(error)), *UNCHANGED

    def delete(self, key: str, project_key: str, chosen: str | None, went: int, added: str) -> tuple:
        """Delete a job. If it is the one that the page shows, the newest of the others takes its place."""
        if added == DECLINED:
            return "", *UNCHANGED
        try:
            project, is_at_work = self._chosen(key, project_key, chosen, added)
            if is_at_work and project.key == project_key:
                raise JobError(PAGE_AT_WORK)
            self.studio.drop(project)
            self.studio.workspace.remove(project)
        except Exception as error:
            return html.trouble(explain(error)), *UNCHANGED
        if project.key != project_key:
            return "", *UNCHANGED
        own = self.studio.workspace.projects(key)
        return "", went + 1, *(self._shown(own[0]) if own else NOTHING)

    def _chosen(self, key: str, project_key: str, chosen: str | None, added: str) -> tuple[Project, bool]:
        """The chosen job, and whether the page is at work on the one that it shows."""
        if not chosen:
            raise ValueError("a job is needed, and none is chosen: choose one of the list")
        shown = self.studio.found(key, project_key) if project_key else None
        is_at_work = added == AT_WORK or (shown is not None and shown.status().is_under_way)
        return self.studio.project(key, chosen), is_at_work

    def _shown(self, project: Project) -> tuple:
        return project.key, *links.chosen({}, project), *self.answers.view(project)


def line(project: Project) -> str:
    """A job in one line, with all that tells it from others; "" if it is being removed."""
    settings = project.settings
    told = [project.model, f"{settings.bits} bits", settings.recipe, f"seed {settings.seed}"]
    told += [f"keeping {' '.join(settings.keep)}"] * bool(settings.keep) + written(settings.call_arguments)
    told += ["parts fetched"] * (project.components == "reference")
    try:
        told += [html.PHASES[project.status().phase].lower(), size(folder_bytes(project.folder))]
    except OSError:
        return ""
    return printable(" · ".join(told))


PAGE_AT_WORK = "this page follows a job that is at work: stop it first, or open a second tab"
UNCHANGED = (gr.skip(),) * 16  # of counter, project, choice and run step
NOTHING = (
    "",
    *(gr.skip(),) * 7,
    html.empty("Nothing runs yet."),
    charts.chart([], 0, []),
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
            self.went = gr.State(0)  # counts how often another job came onto the page
            self.none = gr.HTML(html.empty(NONE_YET))
            self.jobs = gr.Radio([], label="Job", visible=False, elem_id="jobs")
            self.added = gr.Textbox(visible=False)
            self.trouble = gr.HTML(elem_id="jobs-trouble")
            with gr.Row(elem_classes="buttons"):
                self.show = gr.Button("Show it", visible=False, elem_id="jobs-show")
                self.delete = gr.Button("Delete it", visible=False, elem_id="jobs-delete")

    def wire(self, job: list, shown: list, occasions: list[Any], turned: Any) -> None:
        """List anew on the `occasions` and when a stream of work is over; `went` changes when another job is on the page.

        Args:
            job: visitor and project.
            shown: project, choice and run step.
        """
        answers, chosen, outputs = self.answers, [*job, self.jobs], [self.trouble, self.went, *shown]
        listing = [self.jobs, self.show, self.delete, self.none]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.show.click(answers.show, [*chosen, self.went, self.added], outputs, js=SHOWN, **hidden)
        deleted = self.delete.click(answers.delete, [*chosen, self.went, self.added], outputs, js=CONFIRMED, **hidden)
        for event in occasions:
            event.then(answers.listed, job, listing, **hidden)
        for event in (deleted, turned):
            event.then(answers.listed, chosen, listing, **hidden)
