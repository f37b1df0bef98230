"""Attribution: what one layer adds to the error is what is measured when only that layer is quantized."""

import copy

import pytest
import torch
from tiny import new_pipeline, new_transformer, quick_settings

from vq4dit import UnsupportedModelError, quantize
from vq4dit.evaluation.layer_errors import layer_noise_errors
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.pipelines.decode_modes import packed_layers


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
    transformer.set_submodule(name, packed_layers(quantized.transformer)[name])
    alone.register_modules(transformer=transformer)
    assert estimated == pytest.approx(noise_nmse(original, alone, **settings), rel=0.3)


def test_every_layer_is_told_in_order_and_the_models_are_left_as_they_were(pair):
    original, quantized = pair
    original.transformer.requires_grad_(True)
    steps = []
    settings = {"num_trajectories": 1, "num_inference_steps": 2, "on_progress": lambda progress: steps.append(progress.done)}
    first, again = (layer_noise_errors(original, quantized, **settings) for _ in range(2))
    assert list(first) == list(packed_layers(quantized.transformer)) and first == again and steps == [1, 2, 1, 2]
    assert all(error > 0 for error in first.values())
    assert all(p.grad is None and p.requires_grad for p in original.transformer.parameters())
    assert not any(module._forward_hooks for module in original.transformer.modules())


def test_trajectories_that_do_not_fit_into_memory_together_are_walked_one_after_the_other(pair, monkeypatch):
    settings = {"num_trajectories": 128, "num_inference_steps": 1}
    together = layer_noise_errors(*pair, **settings)
    monkeypatch.setattr("vq4dit.evaluation.layer_errors.TOKENS_TOGETHER", 40 * 2 * 16)
    steps = []
    apart = layer_noise_errors(*pair, **settings, on_progress=lambda progress: steps.append((progress.done, progress.total)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sum(apart.values()) == pytest.approx(sum(together.values()), rel=0.3)


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"attention_head_dim": 64}], ids=["fewer blocks", "wider"])
def test_a_model_that_was_made_from_another_is_refused(pair, changes):
    other = new_pipeline()
    other.register_modules(transformer=new_transformer(**changes))
    with pytest.raises(UnsupportedModelError, match="compare it with the model it was made from"):
        layer_noise_errors(other, pair[1])


def test_a_model_that_is_not_quantized_has_no_layers_to_tell_of(pipeline):
    with torch.no_grad():
        assert layer_noise_errors(pipeline, pipeline, num_trajectories=1, num_inference_steps=1) == {}
