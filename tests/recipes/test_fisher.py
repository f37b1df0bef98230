"""Sensitivity: which outputs of a layer matter to the guided noise."""

from dataclasses import replace
from itertools import count

import pytest
import torch
from tiny import QUICK, guided_in_turn

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.trajectories import ROUNDS, Sampling, steps_sampled
from vq4dit.recipes import fisher
from vq4dit.recipes.fisher import num_steps, output_sensitivities

SAMPLING = Sampling({"guidance_scale": 4.0}, tokens=32)  # 16 positions, with a class and with none
LAYERS = ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn1.to_v", "transformer_blocks.1.ff.net.2"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("layer", "reader"), [("attn1.to_v", "attn1.to_out.0"), ("ff.net.0.proj", "ff.net.2")])
def test_outputs_that_are_read_with_three_times_the_weight_matter_nine_times_as_much(pipeline, layer, reader):
    block, name = pipeline.transformer.transformer_blocks[0], f"transformer_blocks.0.{layer}"
    columns = block.get_submodule(reader).weight.data
    half = columns.shape[1] // 2
    columns[:, :half] *= 3
    columns[:, 0] = 0
    found = output_sensitivities(pipeline, [name], SAMPLING, seeded(), QUICK).outputs[name].diagonal()
    assert found[0] == 0
    assert (found[1:half].mean() / found[half:].mean()).item() == pytest.approx(9, rel=0.4)


def test_layers_compare_with_each_other_and_the_same_seed_gives_the_same(pipeline):
    first, second = (output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK) for _ in range(2))
    diagonals = {name: found.diagonal() if found.ndim == 2 else found for name, found in first.outputs.items()}
    assert max(diagonal.mean().item() for diagonal in diagonals.values()) == pytest.approx(1, rel=1e-5)
    for name in LAYERS:
        assert diagonals[name].shape == (pipeline.transformer.get_submodule(name).out_features,)
        assert torch.equal(first.outputs[name], second.outputs[name])
    assert torch.equal(first.steps[LAYERS[0]], second.steps[LAYERS[0]])


def test_a_layer_whose_outputs_are_scaled_down_matters_less(pipeline):
    """Halve what reads it, and its errors count a quarter, against all other layers."""
    name, other = "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.0.attn1.to_v"
    before = output_sensitivities(pipeline, [name, other], SAMPLING, seeded(), QUICK).outputs
    reader = pipeline.transformer.transformer_blocks[1].ff.net[2]
    reader.weight.data /= 2
    after = output_sensitivities(pipeline, [name, other], SAMPLING, seeded(), QUICK).outputs
    ratios = [found[name].diagonal().mean() / found[other].diagonal().mean() for found in (before, after)]
    assert (ratios[1] / ratios[0]).item() == pytest.approx(0.25, rel=0.3)


def test_layers_without_tokens_know_how_much_each_step_counts(pipeline):
    found = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK).steps
    assert list(found) == LAYERS[:1] and found[LAYERS[0]].shape == (fisher.STEPS, 1, 2)
    assert found[LAYERS[0]].sum().item() == pytest.approx(1, rel=1e-5) and (found[LAYERS[0]] > 0).all()


def test_a_step_counts_by_what_it_does_to_the_image(pipeline, monkeypatch):
    of_all = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
    numbers = count()
    weight = lambda *_: 7.0 * (next(numbers) == 2)  # noqa: E731 - in the first round, which shows it
    monkeypatch.setattr("vq4dit.models.trajectories.step_weight", weight)
    of_one = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
    steps = of_one.steps[LAYERS[0]]
    assert steps[2].sum().item() == pytest.approx(1, rel=1e-5) and steps.count_nonzero() == 2
    ratio = of_all.steps[LAYERS[0]][2]
    torch.testing.assert_close(steps[2], ratio / ratio.sum())
    assert not torch.allclose(of_one.outputs[LAYERS[1]], of_all.outputs[LAYERS[1]], rtol=0.1)


def test_layers_know_which_errors_add_up_and_those_of_large_models_only_which_matter(pipeline, monkeypatch):
    found = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), replace(QUICK, probes=(1,))).outputs
    assert [found[name].ndim for name in LAYERS] == [2, 2, 2]
    torch.testing.assert_close(found[LAYERS[1]], found[LAYERS[1]].T)
    monkeypatch.setattr("vq4dit.models.trajectories.LARGE", 0)
    large = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), replace(QUICK, probes=(1,))).outputs
    assert [large[name].ndim for name in LAYERS] == [1, 1, 1]
    compared = [found[LAYERS[1]].diagonal() / found[LAYERS[0]].trace(), large[LAYERS[1]] / large[LAYERS[0]].sum()]
    torch.testing.assert_close(*compared)


@pytest.mark.parametrize("asked_before", [False, True])
def test_large_models_run_their_blocks_again_on_the_way_back(pipeline, monkeypatch, asked_before):
    if asked_before:
        pipeline.transformer.enable_gradient_checkpointing()
    monkeypatch.setattr("vq4dit.models.trajectories.LARGE", 0)
    passes = []
    pipeline.transformer.transformer_blocks[1].ff.register_forward_hook(lambda *_: passes.append(1))
    output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), replace(QUICK, probes=(1,)))
    assert len(passes) == steps_sampled(ROUNDS) + fisher.STEPS  # once to sample it, and where it is shown once more
    assert pipeline.transformer.is_gradient_checkpointing is asked_before


def test_trajectories_are_walked_as_few_at_a_time_as_the_memory_asks_for(pipeline):
    config = replace(QUICK, sensitivity_tokens_together=QUICK.sensitivity_tokens // 2)
    rows = []
    pipeline.transformer.register_forward_pre_hook(lambda *call: rows.append(len(call[1][0])))
    found = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), config)
    assert rows == [2] * 2 * steps_sampled(ROUNDS)  # one trajectory, with a class and with none
    assert found.steps[LAYERS[0]].shape == (fisher.STEPS, 1, 2)


def test_several_probes_of_a_step_count_as_much_as_one(pipeline):
    found = []
    for probes in ((1,), (8,)):
        config = replace(QUICK, sensitivity_tokens=10240, probes=probes)  # of few trajectories one probe tells too little
        found.append(output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), config))
    one, eight = ({name: matrix.trace() for name, matrix in one_or_eight.outputs.items()} for one_or_eight in found)
    conditioning, tokens = LAYERS[:2]
    assert (eight[conditioning] / eight[tokens] / (one[conditioning] / one[tokens])).item() == pytest.approx(1, rel=0.2)
    torch.testing.assert_close(found[1].steps[conditioning], found[0].steps[conditioning], rtol=0.5, atol=0.05)


def test_several_probes_tell_more_of_what_couples_rows(pipeline):
    """Two trajectories' gradients in ten steps span 20 directions at most, those of eight probes more."""
    ranks = []
    for probes in ((1,), (8,)):
        config = replace(QUICK, sensitivity_tokens=1, probes=probes)
        found = output_sensitivities(pipeline, LAYERS[:1], SAMPLING, seeded(), config).outputs[LAYERS[0]]
        ranks.append(torch.linalg.matrix_rank(found.double(), rtol=1e-6).item())
    assert ranks[0] <= 2 * fisher.STEPS < ranks[1]


def test_outputs_that_are_read_as_one_are_coupled(pipeline):
    """Two values that the next layer reads with the same weights: their errors add up, and opposite ones cancel."""
    block, name = pipeline.transformer.transformer_blocks[0], "transformer_blocks.0.attn1.to_v"
    columns = block.attn1.to_out[0].weight.data
    columns[:, 1] = columns[:, 0]
    columns[:, 2] = -columns[:, 0]
    found = output_sensitivities(pipeline, [name], SAMPLING, seeded(), QUICK).outputs[name]
    assert found[0, 1].item() == pytest.approx(found[0, 0].item(), rel=1e-3)
    assert found[0, 2].item() == pytest.approx(-found[0, 0].item(), rel=1e-3)


@pytest.mark.parametrize("trainable", [True, False])
def test_the_teacher_is_left_as_it_was(pipeline, trainable):
    pipeline.transformer.requires_grad_(trainable).train()
    output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
    assert pipeline.transformer.training
    assert all(p.grad is None and p.requires_grad is trainable for p in pipeline.transformer.parameters())
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())


def test_where_nothing_is_known_all_rows_count_the_same(pipeline):
    torch.nn.init.zeros_(pipeline.transformer.proj_out_2.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out_2.bias)
    found = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
    for name, rows in found.outputs.items():
        assert torch.equal(rows, torch.ones(pipeline.transformer.get_submodule(name).out_features))
    assert torch.equal(found.steps[LAYERS[0]], torch.ones(fisher.STEPS, 1, 2))


def test_a_layer_whose_gradient_is_too_large_counts_as_much_as_any_and_one_without_as_little():
    small, large, too_large, none = torch.eye(3), 5 * torch.eye(2), torch.full((4, 4), torch.inf), torch.zeros(2)
    rows = {"a": 3, "b": 2, "c": 4, "d": 2, "never run": 5}
    found = fisher._known({"a": small, "b": large, "c": too_large, "d": none}, rows)
    assert found["c"].tolist() == [1.0] * 4 and found["d"].tolist() == pytest.approx([0.2, 0.2])
    assert list(found) == list(rows) and found["never run"].tolist() == pytest.approx([0.2] * 5)


def test_a_walk_that_is_broken_off_leaves_nothing_behind(pipeline):
    pipeline.transformer.requires_grad_(True)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback, which holds on to what was running
        output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK, stop)
    assert kept.tb is not None
    assert all(p.requires_grad for part in (pipeline.transformer, pipeline.vae) for p in part.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.transformer.modules())


def test_so_many_steps_are_counted_as_are_told(pipeline):
    for together in (320, 640):
        config, told = replace(QUICK, sensitivity_tokens=1280, sensitivity_tokens_together=together), []
        output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), config, lambda told=told: told.append(1))
        assert len(told) == num_steps(SAMPLING, config) == fisher.STEPS * 1280 // together


def test_guidance_by_two_calls_is_known_apart_like_guidance_by_two_halves(pipeline):
    """The same steps, one after the other in each: of layers without tokens each call has its own weight."""
    pipeline.__class__ = type("InTurn", (type(pipeline),), {"__call__": guided_in_turn})
    found = output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
    steps = found.steps[LAYERS[0]]
    assert steps.shape == (fisher.STEPS, 2, 2) and (steps > 0).all() and steps.sum().item() == pytest.approx(1, rel=1e-5)
    assert found.outputs[LAYERS[1]].shape == (64, 64)


def test_a_pipeline_whose_prediction_has_no_gradient_is_refused(pipeline):
    pipeline.transformer.register_forward_hook(lambda *call: call[-1].__class__(sample=call[-1].sample.detach()))
    with pytest.raises(UnsupportedModelError, match="the prediction of DiTPipeline has no gradient at its scheduler"):
        output_sensitivities(pipeline, LAYERS, SAMPLING, seeded(), QUICK)
