"""Pairs of what a model is asked for: prompts as well as classes, films as well as pictures, and those drawn long ago."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
from PIL import Image

from vq4dit.config import QuantizationSettings
from vq4dit.errors import VQ4DiTError
from vq4dit.projects.catalog import Catalog
from vq4dit.projects.drawn_pairs import draw, drawn_pairs, file_stem, is_complete, report
from vq4dit.projects.pair_settings import PairSettings, prompts_in
from vq4dit.projects.pipeline_cache import Loader
from vq4dit.projects.publish import _evidence
from vq4dit.projects.worker import work
from vq4dit.projects.workspace import Workspace

FEW = {"num_inference_steps": 2}
CALLS = {"flux": {"height": 32, "width": 32, "max_sequence_length": 8}, "wan": tiny_pipelines.CALLS["wan"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in CALLS:
        tiny_pipelines.build(name).save_pretrained(folder / name)
    return folder


@pytest.fixture
def loader(root, tmp_path):
    return Loader(Catalog(tmp_path, root))


@pytest.fixture
def packed(loader, tmp_path):
    """Quantize one of the models by k-means; the project."""
    workspace = Workspace(tmp_path / "jobs")

    def make(name: str, call: dict):
        project = workspace.open(workspace.visitor(None), f"folder:{name}", QuantizationSettings(recipe="kmeans", call=call))
        list(work(project, loader))
        assert project.status().phase == "done", project.status()
        return project

    return make


def picture(project, pair, kind="original") -> np.ndarray:
    return np.asarray(Image.open(project.report / f"{pair.stem}-{kind}.png"))


def test_prompts_are_drawn_with_the_call_of_the_project_kept_and_measured(packed, loader):
    project = packed("flux", CALLS["flux"])
    one, two = (PairSettings(tuple(prompts), **FEW) for prompts in (["a fox"], ["a fox", "a <b>rocket</b>"]))
    list(draw(project, loader, one))
    (first,) = drawn_pairs(project)
    assert (first.condition, first.name, first.seed) == ("a fox", "a fox", 0) and is_complete(project, one)
    list(draw(project, loader, two))
    assert is_complete(project, two) and drawn_pairs(project)[0] == first
    assert picture(project, first).shape == (32, 32, 3)
    assert report(project)["call"] == CALLS["flux"] and report(project)["guidance_scale"] == 3.5
    with _evidence(project) as files:
        assert set(files) == {"report.json", "samples.png"}


def test_another_guidance_is_another_pair(packed, loader):
    project = packed("flux", CALLS["flux"])
    own, other = (PairSettings(("a fox",), guidance_scale=scale, **FEW) for scale in (None, 9.0))
    list(draw(project, loader, own))
    before = picture(project, drawn_pairs(project)[0])
    assert not is_complete(project, other)
    list(draw(project, loader, other))
    assert is_complete(project, other) and report(project)["guidance_scale"] == 9.0
    assert not np.array_equal(before, picture(project, drawn_pairs(project)[0]))


def test_of_a_film_some_frames_stand_side_by_side(packed, loader):
    project = packed("wan", CALLS["wan"])
    list(draw(project, loader, PairSettings(("a fox",), **FEW)))
    (pair,) = drawn_pairs(project)
    frames = CALLS["wan"]["num_frames"]
    for kind in ("original", "quantized", "difference"):
        height, width, _ = picture(project, pair, kind).shape
        assert height == 32 and width // 32 == frames


def test_what_a_page_holds_becomes_what_the_projects_model_takes(packed):
    project = packed("flux", CALLS["flux"])
    assert PairSettings.of(project, [3], "a\n\n b \na", 2, " 4 ").wanted()[:3] == [("a", 0, 4.0), ("b", 0, 4.0), ("a", 1, 4.0)]
    with pytest.raises(ValueError, match="guidance must be a number, such as 4.5, got 'high'"):
        PairSettings.of(project, [], "a", 1, "high")
    path = project.result / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"_class_name": "DiTPipeline"}))
    assert PairSettings.of(project, [3], "a", 1, "").wanted() == [(3, 0, None)]
    assert PairSettings.of(project, [], "a", 1, "").wanted() == [(0, 0, None)], "its classes have no names to choose"
    path.write_text(json.dumps(index | {"_class_name": "DiTPipeline", "id2label": {"0": "a"}}))
    with pytest.raises(ValueError, match="none is chosen: choose at least one"):
        PairSettings.of(project, [], "a", 1, "")
    path.write_text(json.dumps(index | {"_class_name": "WanImageToVideoPipeline"}))
    with pytest.raises(VQ4DiTError, match="WanImageToVideoPipeline needs more: load the packed model and call it yourself"):
        PairSettings.of(project, [], "a", 1, "")


def test_prompts_are_as_many_as_can_be_drawn():
    assert prompts_in(" a \r\n\nb\na\n\ud800c") == ["a", "b", "c"]
    with pytest.raises(ValueError, match="there are none: write one a line"):
        prompts_in(" \n\t\n")
    for text in ("x" * 501, "\n".join(map(str, range(13)))):
        with pytest.raises(ValueError, match="at most 12 prompts of 500 characters are drawn at once, got .*: take fewer"):
            prompts_in(text)


def test_names_of_files_are_short_harmless_and_another_for_every_prompt():
    long = "a portrait of a young woman with freckles " * 20
    prompts = ["", "../../etc", "a/b\x00c", "CON", "ü 猫 🚀", "<img src=x>", long, long + "!", "A fox", "a fox", "a-fox"]
    stems = [file_stem(prompt, prompt, seed) for prompt in prompts for seed in (0, 1)]
    assert all(re.fullmatch(r"[A-Za-z0-9-]{1,90}", stem) for stem in stems)
    assert len({stem.casefold() for stem in stems}) == len(stems)


def test_pairs_of_earlier_versions_are_read(packed):
    project = packed("flux", CALLS["flux"])
    project.report.mkdir()
    old = {"label": 3, "name": "fox", "seed": 1, "psnr": 20.0, "ssim": 0.9, "stem": "fox-3-seed1", "original_seconds": 0.1}
    (project.report / "pairs.json").write_text(json.dumps([old | {"quantized_seconds": 0.1}]))
    (pair,) = drawn_pairs(project)
    assert pair.key == (3, 1, None) and pair.stem == file_stem("fox", 3, 1)
