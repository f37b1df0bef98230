"""Attribution: what one layer adds to the error is what is measured when only that layer is quantized."""

import copy

import pytest
import torch
from conftest import quick_settings

from vq4dit import quantize
from vq4dit.attribution import layer_noise_errors
from vq4dit.diffusers_quantizer import vq_layers
from vq4dit.evaluation import noise_nmse


@pytest.fixture
def pair(pipeline):
    return pipeline, quantize(pipeline, quick_settings(recipe="kmeans", bits=4))


@pytest.mark.parametrize("layer", ["attn1.to_v", "ff.net.2", "norm1.linear"])
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_the_error_of_a_layer_is_that_of_a_model_in_which_only_it_is_quantized(pair, layer, scale):
    original, quantized = pair
    name = f"transformer_blocks.1.{layer}"
    settings = {"num_trajectories": 256, "num_inference_steps": 1, "guidance_scale": scale}
    estimated = layer_noise_errors(original, quantized, **settings)[name]
    alone = copy.copy(original)
    transformer = copy.deepcopy(original.transformer)
    transformer.set_submodule(name, vq_layers(quantized.transformer)[name])
    alone.register_modules(transformer=transformer)
    assert estimated == pytest.approx(noise_nmse(original, alone, **settings), rel=0.3)


def test_every_layer_is_told_in_order_and_the_models_are_left_as_they_were(pair):
    original, quantized = pair
    original.transformer.requires_grad_(True)
    steps = []
    settings = {"num_trajectories": 1, "num_inference_steps": 2, "on_step": lambda: steps.append(1)}
    first, again = (layer_noise_errors(original, quantized, **settings) for _ in range(2))
    assert list(first) == list(vq_layers(quantized.transformer)) and first == again and len(steps) == 4
    assert all(error > 0 for error in first.values())
    assert all(p.grad is None and p.requires_grad for p in original.transformer.parameters())
    assert not any(module._forward_hooks for module in original.transformer.modules())


def test_a_model_that_is_not_quantized_has_no_layers_to_tell_of(pipeline):
    with torch.no_grad():
        assert layer_noise_errors(pipeline, pipeline, num_trajectories=1, num_inference_steps=1) == {}
