import copy
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import new_pipeline

from vq4dit import QuantizationSettings, quantize
from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError
from vq4dit.evaluation.images import SamplePair, grid, label_ids, sample
from vq4dit.evaluation.metrics import compare, layer_errors, noise_nmse
from vq4dit.randomness import named_generator


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_noise_nmse_of_a_model_with_itself_is_zero(pipeline, scheduler):
    pipeline.register_modules(scheduler=getattr(diffusers, scheduler).from_config(pipeline.scheduler.config))
    assert noise_nmse(pipeline, pipeline, num_trajectories=2, num_inference_steps=4) == 0


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_nmse_is_what_a_hand_computes(pipeline, scale, kind):
    """Both models guide at the latents of the original, from labels and noise of the held-out generator."""
    pipeline.register_modules(scheduler=DDIMScheduler(clip_sample=False, prediction_type=kind))
    quantized = quantize(pipeline, QuantizationSettings(recipe="kmeans"))
    generator = named_generator(5, "held-out trajectories")
    labels = torch.randint(3, (2,), generator=generator)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=kind)
    scheduler.set_timesteps(3)
    error = power = 0.0
    for t in scheduler.timesteps:
        with torch.no_grad():
            wanted, found = (guided(p.transformer, x, t, labels, scale) for p in (pipeline, quantized))
        error += (wanted - found).square().sum().item()
        power += wanted.square().sum().item()
        x = scheduler.step(wanted, t, x).prev_sample
    few = {"num_trajectories": 2, "num_inference_steps": 3, "seed": 5}
    assert noise_nmse(pipeline, quantized, call={"guidance_scale": scale}, **few) == pytest.approx(error / power, rel=1e-4)


def guided(transformer, x, t, labels, scale):
    """Classifier-free guidance, and up to a scale of 1 none."""
    with_class, without = (
        transformer(x, timestep=t.expand(2), class_labels=of).sample for of in (labels, torch.full_like(labels, 1000))
    )
    return without + scale * (with_class - without) if scale > 1 else with_class


def test_a_prediction_that_is_off_by_a_tenth_has_an_error_of_a_hundredth(pipeline):
    """In every step, whatever those before it did: the other model is led back each time."""
    louder = copy.copy(pipeline)
    louder.register_modules(transformer=copy.deepcopy(pipeline.transformer))
    for parameter in louder.transformer.proj_out_2.parameters():
        parameter.data *= 1.1
    assert noise_nmse(pipeline, louder, num_trajectories=2, num_inference_steps=6) == pytest.approx(0.01, rel=1e-3)


def test_noise_nmse_leaves_both_pipelines_as_they_were(pipeline):
    pipeline.scheduler.set_timesteps(7)
    before, timesteps = dict(vars(pipeline)), pipeline.scheduler.timesteps
    noise_nmse(pipeline, pipeline, num_trajectories=1, num_inference_steps=2)
    assert vars(pipeline) == before and pipeline.scheduler.timesteps is timesteps
    for module in pipeline.transformer.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def test_noise_nmse_falls_with_more_bits(pipeline):
    errors = []
    for bits in (2, 3, 4):
        quantized = quantize(pipeline, QuantizationSettings(recipe="kmeans", bits=bits))
        errors.append(noise_nmse(pipeline, quantized, num_trajectories=4, num_inference_steps=3))
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1]


def test_an_image_does_not_depend_on_its_batch(pipeline):
    together = sample(pipeline, [0, 1, 2], [7, 8, 9], num_inference_steps=2)
    alone = sample(pipeline, [1], [8], num_inference_steps=2)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-4)


def test_guidance_is_refused_where_the_pipeline_cannot_ask_for_no_class():
    pipeline = new_pipeline(num_embeds_ada_norm=3)
    assert sample(pipeline, [0], [1], num_inference_steps=2, call={"guidance_scale": 1.0}).shape == (1, 8, 8, 3)
    with pytest.raises(UnsupportedModelError, match="asks for class 1000.*ends at 3"):
        sample(pipeline, [0], [1], num_inference_steps=2)
    with pytest.raises(UnsupportedModelError, match="asks for class 1000"):  # before the noise is compared
        compare(pipeline, pipeline, 1, 1, conditions=[0], on_progress=lambda progress: pytest.fail("minutes were spent"))


def test_psnr_and_ssim_of_known_images():
    black, grey = np.zeros((16, 16, 3), dtype=np.float32), np.full((16, 16, 3), 0.1, dtype=np.float32)
    assert SamplePair(0, 0, black, grey).psnr == pytest.approx(20, abs=1e-4)
    assert SamplePair(0, 0, grey, grey).ssim == pytest.approx(1)
    assert SamplePair(0, 0, black, grey).difference.max() == pytest.approx(0.4)


def test_a_layer_of_zeros_has_no_error(pipeline):
    name = "transformer_blocks.0.attn1.to_v"
    pipeline.transformer.get_submodule(name).weight.data.zero_()
    quantized = quantize(pipeline, QuantizationSettings(recipe="kmeans"))
    errors = {row.name: row.relative_error for row in layer_errors(pipeline.transformer, quantized.transformer)}
    assert errors[name] == 0


def test_layer_errors_are_relative_squared_errors(pipeline):
    quantized = quantize(pipeline, QuantizationSettings(recipe="kmeans"))
    errors = layer_errors(pipeline.transformer, quantized.transformer)
    assert len(errors) == 14
    first = errors[0]
    wanted = pipeline.transformer.get_submodule(first.name).weight
    found = quantized.transformer.get_submodule(first.name).weight
    assert first.relative_error == pytest.approx(((wanted - found).norm() / wanted.norm()).item() ** 2, rel=1e-4)
    assert first.bits_per_weight == pytest.approx(2 + 16 * 256 * 4 / (384 * 64))


def test_grid_lays_images_out_row_by_row():
    images = [np.full((4, 4, 3), value) for value in (0.0, 0.2, 0.4)]
    pixels = np.asarray(grid(images, columns=2, gap=2))
    assert pixels.shape == (10, 10, 3)
    assert pixels[0, 0, 0] == 0 and pixels[0, 6, 0] == 51 and pixels[6, 0, 0] == 102 and pixels[9, 9, 0] == 255


def test_labels_are_names_or_numbers(pipeline):
    assert label_ids(pipeline, ["fox", "1"]) == [2, 1]
    with pytest.raises(ValueError, match="no class '3'"):
        label_ids(pipeline, ["3"])


def test_the_worst_pair_is_finite():
    zeros = np.zeros((12, 12, 3), dtype=np.float32)
    assert math.isfinite(SamplePair(0, 0, zeros, zeros).psnr)


def test_more_steps_than_the_scheduler_knows_are_refused_before_the_work(pipeline):
    pipeline.scheduler = DDIMScheduler(num_train_timesteps=20, clip_sample=False)
    silent = {"on_progress": lambda progress: pytest.fail("minutes were spent")}
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps .*DDIMScheduler.*21 were asked for: take fewer"):
        sample(pipeline, [0], [0], num_inference_steps=21, **silent)
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps"):
        compare(new_pipeline(), pipeline, 1, 1, conditions=[0], num_inference_steps=21, **silent)
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps"):
        noise_nmse(pipeline, pipeline, num_inference_steps=21, **silent)
    assert sample(pipeline, [0], [0], num_inference_steps=20).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "settings",
    [{"call": {"guidance_scale": math.nan}}, {"call": {"guidance_scale": math.inf}}, {"num_inference_steps": 0}],
    ids=str,
)
def test_numbers_that_mean_nothing_are_misuse(pipeline, settings):
    with pytest.raises(ValueError, match="must be"):
        sample(pipeline, [0], [0], **settings)


def test_a_model_that_predicts_nothing_can_be_compared_with_itself(pipeline):
    for parameter in pipeline.transformer.proj_out_2.parameters():
        parameter.data.zero_()
    assert noise_nmse(pipeline, pipeline, num_trajectories=1, num_inference_steps=1) == 0


def test_a_comparison_has_no_figures_that_are_not_finite(pipeline):
    nothing = new_pipeline()
    for parameter in nothing.transformer.proj_out_2.parameters():
        parameter.data.zero_()
    with pytest.raises(FormatError, match="its noise_nmse is inf: the two models have nothing in common"):
        compare(nothing, pipeline, 1, 1, conditions=[0], num_inference_steps=1)


@pytest.mark.parametrize("label", ["9" * 5000, "²", "１"], ids=lambda label: label[:5])
def test_a_number_of_no_class_is_told_whatever_it_is(pipeline, label):
    with pytest.raises(ValueError, match="there is no class .{1,70}; there are 3, such as cat"):
        label_ids(pipeline, [label])


def test_an_argument_that_the_call_does_not_take_is_misuse(pipeline):
    other = {"call": {"true_cfg_scale": 3.0}, "on_progress": lambda progress: pytest.fail("minutes were spent")}
    for work in (lambda: sample(pipeline, [0], [0], **other), lambda: noise_nmse(pipeline, pipeline, **other)):
        with pytest.raises(ValueError, match="DiTPipeline takes no argument 'true_cfg_scale'; it takes class_labels, guidance"):
            work()


@pytest.mark.parametrize("call, scale", [({}, 4.0), ({"guidance_scale": 2}, 2.0)], ids=str)
def test_a_comparison_tells_what_the_pipelines_were_told(pipeline, call, scale):
    report, (pair,) = compare(pipeline, pipeline, 1, 1, conditions=[2], num_inference_steps=1, call=call)
    assert (report.guidance_scale, report.call, report.noise_nmse) == (scale, {}, 0)
    assert (pair.condition, pair.seed, pair.ssim) == (2, 0, pytest.approx(1))


def test_a_film_is_as_similar_as_its_pictures_are_together():
    film = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
    noisy = np.clip(film + 0.1, 0, 1)
    pictures = [SamplePair("a", 0, *frames) for frames in zip(film, noisy, strict=True)]
    assert SamplePair("a", 0, film, noisy).ssim == pytest.approx(np.mean([pair.ssim for pair in pictures]), rel=1e-5)
    assert SamplePair("a", 0, film, film).ssim == pytest.approx(1)
