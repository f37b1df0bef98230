"""Sensitivity: which outputs of a layer matter to the guided noise."""

import pytest
import torch

from vq4dit.sensitivity import row_sensitivities

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
    found = row_sensitivities(pipeline, [name], 4.0, seeded())[name]
    assert found[0] == 0
    assert (found[1:half].mean() / found[half:].mean()).item() == pytest.approx(9, rel=0.4)


def test_each_layer_has_mean_one_and_the_same_seed_gives_the_same(pipeline):
    first, second = (row_sensitivities(pipeline, LAYERS, 4.0, seeded()) for _ in range(2))
    for name in LAYERS:
        assert first[name].shape == (pipeline.transformer.get_submodule(name).out_features,)
        assert first[name].mean().item() == pytest.approx(1, rel=1e-5)
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("trainable", [True, False])
def test_the_teacher_is_left_as_it_was(pipeline, trainable):
    pipeline.transformer.requires_grad_(trainable).train()
    row_sensitivities(pipeline, LAYERS, 4.0, seeded())
    assert pipeline.transformer.training
    assert all(p.grad is None and p.requires_grad is trainable for p in pipeline.transformer.parameters())
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())


def test_where_nothing_is_known_all_rows_count_the_same(pipeline):
    torch.nn.init.zeros_(pipeline.transformer.proj_out_2.weight)
    torch.nn.init.zeros_(pipeline.transformer.proj_out_2.bias)
    for sensitivity in row_sensitivities(pipeline, LAYERS, 4.0, seeded()).values():
        assert torch.equal(sensitivity, torch.ones_like(sensitivity))


def test_a_walk_that_is_broken_off_leaves_nothing_behind(pipeline):
    pipeline.transformer.requires_grad_(True)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:  # with its traceback, which holds on to what was running
        row_sensitivities(pipeline, LAYERS, 4.0, seeded(), stop)
    assert kept.tb is not None
    assert all(p.requires_grad for p in pipeline.transformer.parameters())
    assert not any(module._forward_hooks for module in pipeline.transformer.modules())
