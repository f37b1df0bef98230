"""What a sample takes in the transformer is known from classes and configs alone, before any weight is read."""

from typing import Any

import pytest
import torch
from tiny import new_pipeline
from tiny_pipelines import CALLS, build

from vq4dit.models.positions import USUAL_TEXT, Positions, positions_of
from vq4dit.models.rehearsal import rehearse
from vq4dit.pipelines.skeleton import empty_pipeline


def without_weights(pipeline: Any) -> Any:
    parts = {name: getattr(pipeline, name) for name in ("transformer", "vae") if getattr(pipeline, name, None) is not None}
    with torch.device("meta"):
        return empty_pipeline(type(pipeline), **{name: type(part).from_config(part.config) for name, part in parts.items()})


@pytest.fixture(scope="module")
def flux() -> Any:
    return without_weights(build("flux"))


@pytest.fixture(scope="module")
def wan() -> Any:
    return without_weights(build("wan"))


@pytest.mark.parametrize(
    "name",
    ["pixart-sigma", "sd3", "flux", "flux2-klein", "sana", "ltx", "wan", "cogvideox", "hunyuan-video", "cogview4", "chroma"],
)
def test_they_are_about_those_that_a_rehearsal_counts(name):
    pipeline = build(name)
    rows = positions_of(without_weights(pipeline), CALLS[name]).rows
    assert 0.5 <= rows / rehearse(pipeline, CALLS[name]).tokens <= 2


def test_of_a_model_of_classes_they_are_exactly_those():
    for pipeline in (new_pipeline(), new_pipeline(num_embeds_ada_norm=3)):  # the second cannot be guided
        assert positions_of(without_weights(pipeline), {}).rows == rehearse(pipeline, {}).tokens


def test_a_picture_counts_by_its_area_and_a_text_by_its_length(flux):
    small = positions_of(flux, {"height": 32, "width": 32, "max_sequence_length": 16})
    assert small == Positions(64, 16, passes=1, has_prompts=True)
    large = positions_of(flux, {"height": 64, "width": 64, "max_sequence_length": 20})
    assert (large.picture, large.text) == (4 * small.picture, 20)


def test_what_is_not_told_is_as_calibration_has_it(flux):
    assert positions_of(flux, {}) == positions_of(flux, {"height": 32, "width": 32, "max_sequence_length": 512})


def test_a_film_counts_by_its_frames(wan):
    still, film = (positions_of(wan, {"height": 32, "width": 32, "num_frames": frames}) for frames in (1, 9))
    assert film.picture == 3 * still.picture


@pytest.mark.parametrize("call, passes", [({}, 1), ({"true_cfg_scale": 3}, 2), ({"guidance_scale": 5.0}, 1)], ids=str)
def test_guidance_takes_a_second_pass_where_it_is_not_embedded(flux, call, passes):
    assert positions_of(flux, call).passes == passes


def test_a_text_whose_length_nobody_is_told_is_a_usual_one():
    assert positions_of(without_weights(build("hunyuan-dit")), CALLS["hunyuan-dit"]).text == USUAL_TEXT
