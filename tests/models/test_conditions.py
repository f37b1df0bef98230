"""What a pipeline is asked for is read from its own call, and what it cannot be told is refused by name."""

import pytest
import torch
from tiny import new_pipeline

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.conditions import call_arguments, condition_kind, guided_call, num_classes, random_conditions
from vq4dit.models.prompts import HELD_OUT, PROMPTS


class Draws:
    """As much of a pipeline as is looked at before it draws."""

    components = {}


class FromPrompts(Draws):
    def __call__(
        self, prompt=None, negative_prompt=None, height=None, width=None, guidance_scale=7.5, num_inference_steps=50,
        generator=None, use_resolution_binning=True, **others,
    ):  # fmt: skip
        raise AssertionError("nothing is drawn here")


class FromPromptsAlone(Draws):
    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None):
        raise AssertionError("nothing is drawn here")


class FromAPicture(Draws):
    def __call__(self, image, prompt=None, strength=0.8):
        raise AssertionError("nothing is drawn here")


class FromNoise(Draws):
    def __call__(self, batch_size=1):
        raise AssertionError("nothing is drawn here")


def test_prompts_and_classes_are_told_apart_by_the_call(pipeline):
    assert condition_kind(pipeline) == "class_labels"
    assert condition_kind(FromPrompts()) == condition_kind(FromPromptsAlone()) == "prompt"


@pytest.mark.parametrize(
    "other, found",
    [
        ("not a pipeline", "this is a str"),
        (FromAPicture(), "FromAPicture needs image"),
        (FromNoise(), "FromNoise takes neither"),
    ],
    ids=["a text", "needs a picture", "takes neither"],
)
def test_other_pipelines_are_refused_by_name(other, found):
    with pytest.raises(UnsupportedModelError, match=f"{found}: choose the recipe kmeans, which needs no samples"):
        condition_kind(other)


def test_what_has_no_call_draws_nothing():
    with pytest.raises(UnsupportedModelError, match="a Draws draws nothing"):
        condition_kind(Draws())


def test_classes_are_those_that_have_a_label_or_all_that_are_known(pipeline):
    assert num_classes(pipeline) == 3
    pipeline.labels = None
    assert num_classes(pipeline) == 1000
    assert num_classes(FromPrompts()) == 0


def test_random_classes_are_of_those_that_there_are(pipeline, generator):
    assert set(random_conditions(pipeline, 100, generator)) == {0, 1, 2}


def test_every_prompt_comes_once_before_one_comes_again(generator):
    found = random_conditions(FromPrompts(), 2 * len(PROMPTS) + 1, generator)
    first, second = found[: len(PROMPTS)], found[len(PROMPTS) : -1]
    assert set(first) == set(second) == set(PROMPTS) and first != second != list(PROMPTS)
    assert set(random_conditions(FromPrompts(), 3, generator, ["a", "b"])) == {"a", "b"}


@pytest.mark.parametrize("make", [new_pipeline, FromPrompts], ids=["classes", "prompts"])
def test_equal_seeds_draw_equal_conditions(make):
    drawn = [random_conditions(make(), 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_no_prompt_is_calibrated_on_and_measured_on():
    assert not set(PROMPTS) & set(HELD_OUT)
    assert len(set(PROMPTS)) == len(PROMPTS) and len(set(HELD_OUT)) == len(HELD_OUT)


def test_an_argument_that_the_call_does_not_take_is_refused_with_those_it_takes(pipeline, generator):
    with pytest.raises(ValueError, match="DiTPipeline takes no argument 'height'; it takes class_labels, guidance_scale"):
        call_arguments(pipeline, [0], 4, generator, {"height": 64})


def test_the_call_is_told_what_it_takes_and_what_a_person_wants(generator):
    found = call_arguments(FromPrompts(), ["a", "b"], 4, generator, {"guidance_scale": 3.0})
    assert found == {"prompt": ["a", "b"], "num_inference_steps": 4, "generator": generator, "guidance_scale": 3.0}


def test_every_prompt_has_its_negative_one(generator):
    found = call_arguments(FromPrompts(), ["a", "b", "c"], 4, generator, {"negative_prompt": "blurred"})
    assert found["negative_prompt"] == ["blurred"] * 3
    assert call_arguments(FromPrompts(), ["a"], 4, generator, {"negative_prompt": None})["negative_prompt"] is None


@pytest.mark.parametrize("size", [{"height": 64}, {"width": 64}, {"height": 64, "width": 64}], ids=str)
def test_a_size_that_is_asked_for_is_the_size_that_is_drawn(generator, size):
    assert call_arguments(FromPrompts(), ["a"], 4, generator, size)["use_resolution_binning"] is False
    asked = call_arguments(FromPrompts(), ["a"], 4, generator, {**size, "use_resolution_binning": True})
    assert asked["use_resolution_binning"] is True


@pytest.mark.parametrize(("known", "guided"), [(3, False), (1000, True), (2000, True)])
def test_a_model_that_knows_no_class_1000_is_asked_without_guidance(generator, known, guided):
    """`DiTPipeline` asks for class 1000 where it wants none: a smaller embedder would end before it."""
    found = call_arguments(new_pipeline(num_embeds_ada_norm=known), [0], 4, generator, {})
    assert found.get("guidance_scale", "as the pipeline has it") == ("as the pipeline has it" if guided else 1.0)


def test_what_the_call_is_told_includes_its_own_guidance(pipeline):
    assert guided_call(pipeline, {}) == {"guidance_scale": 4.0}
    assert guided_call(FromPrompts(), {"height": 8, "guidance_scale": 2.0}) == {"guidance_scale": 2.0, "height": 8}
    assert guided_call(FromPromptsAlone(), {}) == {}
