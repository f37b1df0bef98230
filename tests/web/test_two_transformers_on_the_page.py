"""On the page: a film pipeline with two transformers is looked at, quantized, drawn and taken home like every other."""

from pathlib import Path

import pytest
from tiny_pipelines import CALLS, build

from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.pipelines.load import load_pipeline
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.workspace import Workspace
from vq4dit.web.answers import Answers
from vq4dit.web.compare_answers import CompareAnswers
from vq4dit.web.studio import Studio

HOME = Path(__file__).parents[2]
CALL = "\n".join(f"{name}={value}" for name, value in ({**CALLS["wan22"], "height": 16, "width": 16}).items())
CHOICE = ("folder:wan22", 2, "kmeans", 0, "", CALL, "copy")


@pytest.fixture
def studio(tmp_path) -> Studio:
    build("wan22").save_pretrained(tmp_path / "root" / "wan22")
    return Studio(Catalog(HOME, tmp_path / "root"), Workspace(tmp_path / "jobs"))


def test_the_whole_way_of_two_transformers(studio):
    answers, visitor = Answers(studio), studio.workspace.visitor(None)
    card = answers.look(None, *CHOICE)[0]
    assert "40 layers are quantized" in card and "transformer_2.blocks.1.ffn.net.2" in card
    *_, key, turn = answers.begin(visitor, 0, None, *CHOICE)
    *_, last = answers.quantize(visitor, key, turn)
    assert "is packed" in last[0]
    project = studio.project(visitor, key)
    packed = load_pipeline(str(project.result))
    assert all(len(packed_layers(part)) == 20 for part in (packed.transformer, packed.transformer_2))
    *_, drawn = CompareAnswers(studio).draw(visitor, key, 1, [], 1, None, "a fox", "")
    assert "1 pair<" in drawn[0]
