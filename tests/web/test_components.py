"""On the page: parts that are not quantized are copied, or fetched from an original that is on the Hub."""

from pathlib import Path
from urllib.parse import parse_qsl

import gradio as gr
import pytest
from referring import contents

from vq4dit.bundled import BUNDLED
from vq4dit.config import QuantizationSettings
from vq4dit.errors import VQ4DiTError
from vq4dit.pipelines.references import read_reference
from vq4dit.pipelines.repository import read_json
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.workspace import Workspace
from vq4dit.web.answers import Answers, command
from vq4dit.web.choice import Choice
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.links import chosen, link_of
from vq4dit.web.studio import Studio

HOME = Path(__file__).parents[2]
REFERENCE = ("ann/base", 2, "kmeans", 0, "", "", "reference")


@pytest.fixture
def studio(hub, model_folder, tmp_path) -> Studio:
    hub.add_repo("ann/base", contents(Path(model_folder)))
    return Studio(Catalog(HOME, Path(model_folder).parent), Workspace(tmp_path / "jobs"))


def test_a_job_by_reference_is_packed_drawn_and_taken_home(hub, studio):
    answers, visitor = Answers(studio), studio.workspace.visitor(None)
    *_, key, turn = answers.begin(visitor, 0, None, *REFERENCE)
    *_, last = answers.quantize(visitor, key, turn)
    assert "is packed" in last[0]
    project = studio.project(visitor, key)
    reference = read_reference(read_json(str(project.result), "model_index.json"), "index")
    assert (reference.model, reference.revision) == ("ann/base", hub.repos["ann/base"].refs["main"])
    assert reference.parts == ["vae"] and not (project.result / "vae").exists()
    *_, drawn = CompareAnswers(studio).draw(visitor, key, 1, [0], 1, None)
    assert "1 pair<" in drawn[0]
    assert "load_pipeline(" in answers.download(visitor, key)[1]


def test_copies_and_references_are_jobs_of_their_own_and_earlier_jobs_are_copies(studio):
    visitor = studio.workspace.visitor(None)
    copy, reference = (studio.begin(visitor, Choice(*REFERENCE[:-1], way)) for way in ("copy", "reference"))
    assert copy.key != reference.key and (copy.components, reference.components) == ("copy", "reference")
    settings = QuantizationSettings(recipe="kmeans")
    assert studio.workspace.open(visitor, "ann/base", settings, copy.revision).key == copy.key
    assert "components" not in (copy.folder / "project.json").read_text()


@pytest.mark.parametrize("model", ["folder:tiny", BUNDLED])
def test_a_model_of_this_server_has_nothing_to_refer_to(studio, model):
    answers, visitor = Answers(studio), studio.workspace.visitor(None)
    assert not answers.offer(model, "reference").interactive and answers.offer(model, "reference").value == "copy"
    told = answers.begin(visitor, 0, None, model, *REFERENCE[1:])[0]
    assert "only where it is a repository on the Hub." in told and "Choose to copy them." in told and "--components" not in told
    with pytest.raises(VQ4DiTError, match="can be referenced only of a repository"):
        studio.begin(visitor, Choice(model, *REFERENCE[1:]))
    assert not studio.workspace.projects(visitor)


def test_a_model_of_the_hub_has(studio):
    offered = Answers(studio).offer("ann/base", "reference")
    assert offered.interactive and offered.value == "reference"
    assert not Answers(studio).offer("", "copy").interactive


def test_link_and_command_say_it_and_a_link_restores_it(studio):
    choice = Choice(*REFERENCE)
    answers, drawn = Answers(studio), ("", [], "", 1, "")
    assert "--components reference --output" in command(choice) and "components=reference" in answers.link(*drawn, *REFERENCE)
    assert "components" not in command(Choice(*REFERENCE[:-1])) + answers.link(*drawn, *REFERENCE[:-1])
    link = dict(parse_qsl(link_of(choice.model, choice.settings(), choice.components).removeprefix("?")))
    assert chosen(link, None) == REFERENCE
    assert chosen(link | {"components": "<img>"}, None)[-1] == "copy"
    project = studio.begin(studio.workspace.visitor(None), choice)
    assert chosen({}, project) == REFERENCE


def test_a_link_that_refers_to_a_model_of_this_server_is_one_that_copies(studio):
    request = gr.Request()
    request.request = type("Asked", (), {"query_params": {"model": "folder:tiny", "components": "reference"}})()
    answer = Answers(studio).arrive("", request, None)
    assert answer[3:10] == ("folder:tiny", 2, "best", 0, "", "", "copy")


def test_what_is_not_copied_needs_no_room(studio, model_folder):
    costs = [studio.costs(studio.card("ann/base"), Choice(*REFERENCE[:-1], way))[2] for way in ("copy", "reference")]
    vae = (Path(model_folder) / "vae/diffusion_pytorch_model.safetensors").stat().st_size
    assert costs[0].disk_bytes - costs[1].disk_bytes == vae
