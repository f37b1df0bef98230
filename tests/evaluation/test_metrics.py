import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from tiny import new_pipeline

from vq4dit import QuantizationSettings, quantize
from vq4dit.errors import FormatError, UnsupportedModelError, VQ4DiTError
from vq4dit.evaluation.images import SamplePair, grid, label_ids, sample
from vq4dit.evaluation.metrics import compare, layer_errors, noise_nmse, predicted_noise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_tells_the_noise(kind, generator):
    scheduler = DDIMScheduler(prediction_type=kind)
    x0, noise = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 700])
    noisy = scheduler.add_noise(x0, noise, timesteps)
    prediction = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, timesteps), "sample": x0}[kind]
    torch.testing.assert_close(predicted_noise(prediction, noisy, timesteps, scheduler), noise, rtol=1e-3, atol=1e-3)


def test_other_prediction_types_are_refused():
    scheduler = DDIMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(UnsupportedModelError, match="'flow'"):
        predicted_noise(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8), torch.tensor([1]), scheduler)


def test_noise_nmse_of_a_model_with_itself_is_zero(pipeline):
    assert noise_nmse(pipeline, pipeline, num_trajectories=2, num_inference_steps=2) == 0


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
    assert sample(pipeline, [0], [1], num_inference_steps=2, guidance_scale=1.0).shape == (1, 8, 8, 3)
    with pytest.raises(UnsupportedModelError, match="asks for class 1000.*ends at 3"):
        sample(pipeline, [0], [1], num_inference_steps=2)
    with pytest.raises(UnsupportedModelError, match="asks for class 1000"):  # before the noise is compared
        compare(pipeline, pipeline, 1, 1, labels=[0], on_progress=lambda progress: pytest.fail("minutes were spent"))


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
        compare(new_pipeline(), pipeline, 1, 1, labels=[0], num_inference_steps=21, **silent)
    with pytest.raises(VQ4DiTError, match="at most 20 denoising steps"):
        noise_nmse(pipeline, pipeline, num_inference_steps=21, **silent)
    assert sample(pipeline, [0], [0], num_inference_steps=20).shape == (1, 8, 8, 3)


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": math.nan}, {"guidance_scale": math.inf}, {"num_inference_steps": 0}], ids=str
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
        compare(nothing, pipeline, 1, 1, labels=[0], num_inference_steps=1)


@pytest.mark.parametrize("label", ["9" * 5000, "²", "１"], ids=lambda label: label[:5])
def test_a_number_of_no_class_is_told_whatever_it_is(pipeline, label):
    with pytest.raises(ValueError, match="there is no class .{1,70}; there are 3, such as cat"):
        label_ids(pipeline, [label])
