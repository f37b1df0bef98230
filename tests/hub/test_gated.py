"""Gated and private bases: who may read one works with it; what is cached for them is shown and lent to nobody else."""

from pathlib import Path

import gradio as gr
import pytest
from held_task import Steps

from vq4dit.config import QuantizationSettings
from vq4dit.errors import HubError
from vq4dit.pipelines.provenance import read_origin
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.workspace import Workspace
from vq4dit.web.answers import Answers
from vq4dit.web.choice import Choice
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.studio import Studio

GATED, PRIVATE = "corp/gated", "ann/private"


@pytest.fixture
def studio(hub, model_folder, tmp_path):
    files = {p.relative_to(model_folder).as_posix(): p.read_bytes() for p in Path(model_folder).rglob("*") if p.is_file()}
    hub.add_repo(GATED, files, gated=True, readers={"ann"}, card={"license": "other"})
    hub.add_repo(PRIVATE, files, private=True)
    return Studio(Catalog(Path(model_folder).parent), Workspace(tmp_path / "jobs"))


@pytest.fixture
def bob(hub) -> str:
    return hub.add_user("bob")


@pytest.mark.parametrize(("model", "reason"), [(GATED, "gated"), (PRIVATE, "missing")])
def test_what_one_visitor_loaded_is_neither_shown_nor_lent_to_another(studio, ann, bob, hub, model, reason):
    choice = Choice(model, 2, "kmeans", 0, "")
    project = studio.begin(studio.workspace.visitor(None), choice, ann.token)
    studio.line_up(project, ann.token)
    assert list(studio.quantize(project))[-1:] in ([], [None]) and project.status().phase == "done"
    commit = hub.repos[model].refs["main"]
    assert (read_origin(project.result).model, read_origin(project.result).revision) == (model, commit)
    fresh = Studio(studio.catalog, studio.workspace)  # nothing in its memory, but the files are on disk
    for visited in (studio, fresh):
        for token in (bob, None):
            for action in (
                lambda: visited.card(model, (), "kmeans", token),  # noqa: B023
                lambda: visited.begin(visited.workspace.visitor(None), choice, token),  # noqa: B023
                lambda: visited.loader.with_login(token).original(project),  # noqa: B023
            ):
                with pytest.raises(HubError) as refused:
                    action()
                assert refused.value.reason == reason
    assert fresh.card(model, (), "kmeans", ann.token).commit == commit
    assert fresh.loader.with_login(ann.token).original(project).labels["cat"] == 0


def test_an_access_withdrawn_between_two_time_slices_pauses_the_job_in_words_until_it_is_given_back(studio, ann, hub, tmp_path):
    answers, visitor, login = Answers(studio), studio.workspace.visitor(None), gr.OAuthToken(ann.token, "", 0)
    studio.queue.put(other := Steps(studio.workspace.open(visitor, GATED, QuantizationSettings(seed=9)), []))
    *_, key, turn = answers.begin(visitor, 0, login, GATED, 2, "kmeans", 0, "")
    hub.repos[GATED].readers.clear()
    other.go()
    *_, last = answers.quantize(visitor, key, turn, login)
    page = f'<a href="{hub.url}/{GATED}"'
    assert "is gated, and this login has no access" in last[0] and page in last[0] and last[6].visible
    hub.repos[GATED].readers.add("ann")
    *_, turn = answers.resume(visitor, key, turn, login)
    *_, last = answers.quantize(visitor, key, turn, login)
    assert "is packed" in last[0]
    compare = CompareAnswers(studio)
    compare.begin_drawing(visitor, key, 0, [0], token=login)
    *_, drawn = compare.draw(visitor, key, 1, [0], 1, login)
    assert "1 pair<" in drawn[0]
    hub.repos[GATED].readers.clear()
    compare.begin_drawing(visitor, key, 1, [1], token=login)
    *_, refused = compare.draw(visitor, key, 2, [1], 1, login)
    assert "is gated, and this login has no access" in refused[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and ann.token.encode() in path.read_bytes()]


def test_a_gated_model_says_where_to_ask_and_a_missing_one_does_not(studio, bob, hub):
    look = Answers(studio).look
    gated, _ = look(gr.OAuthToken(bob, "", 0), GATED, 2, "kmeans", 0, "")
    assert "This model is gated" in gated and f'<a href="{hub.url}/{GATED}"' in gated and "sign in" in gated
    missing, _ = look(gr.OAuthToken(bob, "", 0), "corp/none", 2, "kmeans", 0, "")
    assert "It is not there, or it is private" in missing and "Request access" not in missing


def test_a_page_of_a_running_job_asks_the_hub_nothing(studio, ann, hub):
    """It is redrawn twice a second."""
    answers, visitor = Answers(studio), studio.workspace.visitor(None)
    *_, key, turn = answers.begin(visitor, 0, gr.OAuthToken(ann.token, "", 0), GATED, 2, "kmeans", 0, "")
    hub.requests.clear()
    answers.view(studio.project(visitor, key))
    assert hub.requests == [] and studio.project(visitor, key).forecast().num_blocks == 2
