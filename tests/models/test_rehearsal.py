"""A pipeline is tried before the work: one real step tells whether it works, and how much one sample shows."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import tiny_pipelines
import torch
from tiny import guided_in_turn, new_pipeline

from vq4dit.errors import UnsupportedModelError, VQ4DiTError
from vq4dit.models.prompts import PROMPTS
from vq4dit.models.rehearsal import check_steps, rehearse, small_size


def test_only_the_first_step_is_real(pipeline):
    passes = []
    pipeline.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    steps = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    rehearse(pipeline, {}, 7)
    assert (len(passes), len(steps)) == (1, 7)


@pytest.mark.parametrize("call, tokens", [({}, 32), ({"guidance_scale": 1.5}, 32), ({"guidance_scale": 1.0}, 16)], ids=str)
def test_it_tells_what_one_sample_shows_in_a_step(pipeline, call, tokens):
    """16 positions, and as many again where guidance asks for no class as well."""
    sampling = rehearse(pipeline, call)
    assert (sampling.call, sampling.prompts, sampling.tokens) == (call, PROMPTS, tokens)


def test_several_calls_in_one_step_count_together(pipeline):
    """What guides by calling its transformer twice shows as much as what puts both into one batch."""
    in_turn = type("InTurn", (type(pipeline),), {"__call__": guided_in_turn})
    pipeline.__class__ = in_turn
    assert rehearse(pipeline, {}).tokens == 32


def test_the_pipeline_is_left_as_it_was(pipeline):
    pipeline.transformer.train()
    before = dict(vars(pipeline)), [module.training for module in pipeline.transformer.modules()]
    rehearse(pipeline, {})
    assert (dict(vars(pipeline)), [module.training for module in pipeline.transformer.modules()]) == before
    for module in pipeline.transformer.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def test_more_steps_than_the_scheduler_has_are_refused(pipeline):
    pipeline.register_modules(scheduler=diffusers.DDIMScheduler(num_train_timesteps=20))
    rehearse(pipeline, {}, 20)
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps .* 50 were asked for"):
        rehearse(pipeline, {}, 50)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_steps(pipeline, 0)


def test_labels_beyond_the_embedder_are_refused(pipeline):
    pipeline.labels = {"whale": 5000}
    with pytest.raises(UnsupportedModelError, match="the labels go up to class 5000, and the transformer knows 1000 classes"):
        rehearse(pipeline, {})


def test_a_scheduler_that_the_pipeline_cannot_use_is_refused(pipeline):
    pipeline.register_modules(scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UnsupportedModelError, match="DiTPipeline does not work .*FlowMatchEulerDiscreteScheduler"):
        rehearse(pipeline, {})


def test_a_pipeline_that_draws_only_from_a_picture_is_refused_though_its_call_could_do_without():
    parts = tiny_pipelines.build("ltx").components
    pipeline = diffusers.LTXImageToVideoPipeline(**parts)
    with pytest.raises(UnsupportedModelError, match=r"told a prompt and no image \(.*\): choose the recipe kmeans"):
        rehearse(pipeline, tiny_pipelines.CALLS["ltx"])


def test_what_predicts_no_numbers_is_refused(pipeline):
    pipeline.transformer.proj_out_2.bias.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="step 0 of DiTPipeline predicts values that are not finite"):
        rehearse(pipeline, {})


def test_an_argument_that_its_call_does_not_take_stays_misuse(pipeline):
    with pytest.raises(ValueError, match="takes no argument 'true_cfg_scale'"):
        rehearse(pipeline, {"true_cfg_scale": 3.0})


def test_a_model_without_class_1000_is_rehearsed_without_guidance():
    assert rehearse(new_pipeline(num_embeds_ada_norm=3), {}).tokens == 16


# --- the size ---


def asked(config=None, vae=None, defaults=None, **attributes):
    """As much of a pipeline as tells its size: the arguments of its call with their defaults, and its parts' settings."""
    names = {"prompt": None, "height": None, "width": None} | (defaults or {})

    def call(self, **given):
        raise AssertionError("nothing is drawn here")

    given = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in names.items()]
    call.__signature__ = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *given])
    parts = {"transformer": SimpleNamespace(config=SimpleNamespace(**(config or {})))}
    if vae:
        parts["vae"] = SimpleNamespace(config=SimpleNamespace(**vae))
    return type("Asked", (), {"__call__": call, "components": parts, **parts, **attributes})()


PICTURE = {"default_sample_size": 128, "vae_scale_factor": 8}
FILM = {"vae_scale_factor_spatial": 8, "vae_scale_factor_temporal": 4}
SIZES = {
    "as large as its model is made for": (asked({"patch_size": 2}, **PICTURE | {"default_sample_size": 64}), (512, 512)),
    "but no more than a thousand positions": (asked({"patch_size": 2}, **PICTURE), (512, 512)),
    "with smaller patches": (asked({"patch_size": 1}, **PICTURE), (256, 256)),
    "by the transformer's own size": (asked({"patch_size": 2, "sample_size": 32}, vae_scale_factor=8), (256, 256)),
    "by the defaults of the call": (asked({"patch_size": 2}, defaults={"height": 480, "width": 320}, **PICTURE), (480, 320)),
    "no larger than its autoencoder": (asked({"patch_size": 2}, {"sample_size": 256}, **PICTURE), (256, 256)),
    "nothing is known": (asked(), None),
}


@pytest.mark.parametrize("made, size", SIZES.values(), ids=SIZES)
def test_the_size_is_small_and_one_that_the_model_is_made_for(made, size):
    assert small_size(made) == ({} if size is None else {"height": size[0], "width": size[1]})


def test_a_pipeline_that_takes_no_size_is_told_none(pipeline):
    assert small_size(pipeline) == {}


@pytest.mark.parametrize("side", [2048, 1024, 576, 192, 64])
@pytest.mark.parametrize("scale", [8, 16, 32])
def test_height_and_width_are_whole_positions_and_not_too_small(side, scale):
    made = asked({"patch_size": 1}, defaults={"height": side, "width": side // 2 + 32}, vae_scale_factor=scale)
    size = small_size(made)
    assert min(size.values()) >= 64 and all(pixels % 32 == 0 for pixels in size.values())
    assert size["height"] * size["width"] <= max(1024 * scale**2, 4 * 64 * 64)


def test_films_are_short_and_have_a_whole_number_of_latent_frames():
    film = asked({"patch_size": [1, 2, 2]}, defaults={"num_frames": 81, "height": 480, "width": 832}, **FILM)
    size = small_size(film)
    assert (size["num_frames"] - 1) % 4 == 0 and 1 < size["num_frames"] <= 9
    latent_frames = (size["num_frames"] - 1) // 4 + 1
    assert latent_frames * size["height"] * size["width"] <= 1024 * 16**2
    assert size["width"] > size["height"]
    short = asked({"patch_size": 2}, defaults={"num_frames": 5, "height": 64, "width": 64}, **FILM)
    assert small_size(short) == {"num_frames": 5, "height": 64, "width": 64}


def test_a_person_may_say_another_size(pipeline, monkeypatch):
    monkeypatch.setattr("vq4dit.models.rehearsal.small_size", lambda pipeline: {"guidance_scale": 1.0})
    assert rehearse(pipeline, {}).tokens == 16
    sampling = rehearse(pipeline, {"guidance_scale": 4.0})
    assert sampling.call == {"guidance_scale": 4.0} and sampling.tokens == 32
