"""Attribution: what one layer adds to the error is what is measured when only that layer is quantized."""

import copy

import pytest
import torch
from tiny import new_pipeline, new_transformer, quick_settings

from vq4dit import UnsupportedModelError, quantize
from vq4dit.evaluation.layer_errors import _Added, _by_sample, layer_noise_errors
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.pipelines.decode_modes import packed_layers
from vq4dit.recipes.fisher import Probe


@pytest.fixture
def pair(pipeline):
    return pipeline, quantize(pipeline, quick_settings(recipe="kmeans", bits=4))


@pytest.mark.parametrize("layer", ["attn1.to_v", "ff.net.2", "norm1.linear"])
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_the_error_of_a_layer_is_that_of_a_model_in_which_only_it_is_quantized(pair, layer, scale):
    original, quantized = pair
    name = f"transformer_blocks.1.{layer}"
    settings = {"num_trajectories": 256, "num_inference_steps": 1, "call": {"guidance_scale": scale}}
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


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_rows_of_one_sample_come_together_and_those_of_others_do_not(rows):
    """Rows of a batch: all samples with their conditions, then all without, and so on."""
    products = torch.arange(4.0 * rows).view(rows, 4)
    assert torch.equal(_by_sample(products.flatten(), 4), products.sum(0))


def test_of_rows_that_belong_to_no_sample_the_sum_is_known():
    assert _by_sample(torch.tensor([1.0, 2.0, 4.0]), 2).tolist() == [7, 0]


@pytest.mark.parametrize("calls", [1, 2], ids=["one batch", "two calls"])
def test_what_a_layer_adds_is_squared_when_all_of_a_sample_is_summed(pair, calls):
    """With its condition and without: guidance that puts both into one batch and guidance in two calls are told the same."""
    name = "transformer_blocks.0.attn1.to_v"
    added = _Added(*pair)
    (rows, columns), draw = added.changes[name][0].shape, torch.Generator().manual_seed(0)
    inputs, gradient = torch.randn(4, 5, columns, generator=draw), torch.randn(4, 5, rows, generator=draw)
    for x, g in zip(inputs.chunk(calls), gradient.chunk(calls), strict=True):
        added.listen(name, x, g, Probe(0, 0, 1, 1.0))
    added.end_step(num_values=20, count=2)
    weight, bias = added.changes[name]
    products = (gradient * (inputs @ weight.T + bias)).sum((1, 2))
    wanted = (products[0] + products[2]) ** 2 + (products[1] + products[3]) ** 2
    assert added.found[name] == pytest.approx(wanted.item() * 2 / 20, rel=1e-5) and added.samples == 2
    assert sum(added.found.values()) == added.found[name]


def test_a_model_compared_with_itself_has_no_error_in_any_layer(pair):
    quantized = pair[1]
    same = copy.copy(quantized)
    same.register_modules(transformer=new_transformer())
    for name, layer in packed_layers(quantized.transformer).items():
        linear = same.transformer.get_submodule(name)
        linear.weight.data, linear.bias.data = layer.reconstruct(torch.float32), layer.bias.data.float()
    errors = layer_noise_errors(same, quantized, num_trajectories=1, num_inference_steps=2)
    assert list(errors.values()) == [0.0] * len(errors) != []
