"""Blocks are found by structure, targets by size, embedders are shared, and recording leaves nothing behind."""

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.blocks import (
    Kept,
    block_embedders,
    duplicate_keys,
    equal_embedders,
    find_targets,
    kept_parameters,
    named_blocks,
    recorded_outputs,
    share_embedders,
    unshare_embedders,
)

SMALL = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4)
FAMILIES = {
    "DiT": lambda: DiTTransformer2DModel(**SMALL, sample_size=8, num_embeds_ada_norm=10),
    "PixArt": lambda: PixArtTransformer2DModel(**SMALL, sample_size=8, cross_attention_dim=32, caption_channels=16),
    "SD3": lambda: SD3Transformer2DModel(
        **SMALL, sample_size=8, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16
    ),
    "Sana": lambda: SanaTransformer2DModel(
        **SMALL, num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16
    ),
    "Flux": lambda: FluxTransformer2DModel(
        **SMALL, num_single_layers=3, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8)
    ),
}
SINGLE_BLOCKS = {"Flux": [f"single_transformer_blocks.{i}" for i in range(3)]}
LINEARS = ["norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
EMBEDDER = ["norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2"]
BLOCKS = ["transformer_blocks.0", "transformer_blocks.1"]


def in_both_blocks(names: list[str]) -> list[str]:
    return [f"{block}.{name}" for block in BLOCKS for name in names]


# --- blocks ---


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_every_family_are_found_in_order(family):
    with torch.device("meta"):
        transformer = FAMILIES[family]()
    blocks = named_blocks(transformer)
    assert list(blocks) == BLOCKS + SINGLE_BLOCKS.get(family, [])
    assert all(transformer.get_submodule(name) is block for name, block in blocks.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_targets_in_every_block(family):
    with torch.device("meta"):
        transformer = FAMILIES[family]()
    targets, _ = find_targets(transformer, subvector_dim=4, num_codewords=16)
    assert all(any(target.startswith(f"{block}.") for target in targets) for block in named_blocks(transformer))
    assert all(transformer.get_submodule(name) is linear for name, linear in targets.items())


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)),
        nn.ModuleDict({"heads": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])}),
        nn.ModuleDict({"blocks": nn.ModuleList()}),
        nn.ModuleDict({"attentions": nn.ModuleList([None])}),
    ],
    ids=["convolutions", "single linears", "empty list", "list of nothing"],
)
def test_a_model_without_blocks_is_refused(model):
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} has no transformer blocks"):
        named_blocks(model)


# --- targets ---


def test_the_targets_of_a_dit_are_seven_linears_per_block(transformer):
    targets, kept = find_targets(transformer, subvector_dim=4, num_codewords=256)
    assert list(targets) == in_both_blocks(LINEARS)
    assert kept == [Kept(name, "embedder") for name in in_both_blocks(EMBEDDER)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_and_what_is_quantized_are_all_parameters(family):
    transformer = FAMILIES[family]()
    targets, _ = find_targets(transformer, subvector_dim=4, num_codewords=16)
    kept = kept_parameters(transformer, targets)
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    copies = duplicate_keys(transformer, block_embedders(transformer))
    all_parameters = sum(p.numel() for name, p in transformer.named_parameters() if name not in copies)
    assert sum(kept.values()) + sum(p.numel() for layer in targets.values() for p in layer.parameters()) == all_parameters
    assert not any(".0." in place for place in kept)


def test_what_stays_is_named_by_its_place(transformer):
    targets, _ = find_targets(transformer, 4, 256, keep=["*.to_q"])
    kept = kept_parameters(transformer, targets)
    assert kept["transformer_blocks.*.attn1.to_q"] == 2 * (64 * 64 + 64)
    assert {"pos_embed", "proj_out_1", "transformer_blocks.*.norm1.emb.class_embedder.embedding_table"} <= kept.keys()


def test_sharing_embedders_does_not_change_the_targets(transformer):
    before = list(find_targets(transformer, 4, 256)[0])
    share_embedders(transformer, ["norm1.emb"])
    assert list(find_targets(transformer, 4, 256)[0]) == before


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("*.ff.*", in_both_blocks(["ff.net.0.proj", "ff.net.2"])),
        ("transformer_blocks.0.*", [f"transformer_blocks.0.{name}" for name in LINEARS]),
        ("transformer_blocks.1.attn1.to_[qk]", ["transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1.to_k"]),
    ],
)
def test_layers_that_match_a_pattern_are_kept(transformer, pattern, names):
    targets, kept = find_targets(transformer, 4, 256, keep=[pattern])
    assert [layer.name for layer in kept if layer.reason == f"kept by {pattern!r}"] == names
    assert list(targets) == [name for name in in_both_blocks(LINEARS) if name not in names]


def test_targets_and_kept_are_all_linears_of_the_blocks(transformer):
    targets, kept = find_targets(transformer, 4, 512, keep=["*.norm1.*", "*.to_q"])
    assert sorted([*targets, *(layer.name for layer in kept)]) == sorted(in_both_blocks(LINEARS + EMBEDDER))


def test_a_pattern_that_matches_nothing_is_named(transformer):
    with pytest.raises(ValueError, match=r"matches '\*\.mlp\.\*'; names look like 'transformer_blocks\.0\."):
        find_targets(transformer, 4, 256, keep=["*.ff.*", "*.mlp.*"])


def test_layers_too_small_for_a_codebook_are_kept(transformer):
    targets, kept = find_targets(transformer, subvector_dim=4, num_codewords=512)  # attention: 1024 sub-vectors of 4
    assert list(targets) == in_both_blocks(["norm1.linear", "ff.net.0.proj", "ff.net.2"])
    small = [layer.name for layer in kept if layer.reason == "too small to pay for its codebook or scales"]
    assert small == in_both_blocks(["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"])


def test_layers_narrower_than_a_subvector_are_kept(transformer):
    targets, kept = find_targets(transformer, subvector_dim=128, num_codewords=8)
    assert list(targets) == in_both_blocks(["ff.net.2"])  # 256 inputs
    assert Kept("transformer_blocks.0.attn1.to_q", "64 inputs are less than a sub-vector of 128") in kept


@pytest.mark.parametrize("keep, num_codewords", [([], 65536), (["*"], 256)], ids=["all too small", "all kept"])
def test_nothing_to_quantize_is_refused(transformer, keep, num_codewords):
    with pytest.raises(UnsupportedModelError, match="no layer of this DiTTransformer2DModel"):
        find_targets(transformer, 4, num_codewords, keep=keep)


# --- embedders ---


def test_the_embedder_of_a_dit_block_is_found_once(transformer):
    assert block_embedders(transformer) == ["norm1.emb"]  # and not the embedders inside it


def test_embedders_are_equal_only_if_every_number_is(transformer):
    assert equal_embedders(transformer) == ["norm1.emb"]
    with torch.no_grad():
        transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3, 5] += 1
    assert equal_embedders(transformer) == []


def test_sharing_equal_embedders_saves_memory_and_changes_no_output(transformer, one_step_input):
    before, size = transformer(**one_step_input).sample, sum(p.numel() for p in transformer.parameters())
    share_embedders(transformer, equal_embedders(transformer))
    first, second = (block.norm1.emb for block in transformer.transformer_blocks)
    assert first is second
    assert sum(p.numel() for p in transformer.parameters()) == size - sum(p.numel() for p in first.parameters())
    assert equal_embedders(transformer) == ["norm1.emb"]
    assert torch.equal(transformer(**one_step_input).sample, before)


def test_unsharing_gives_every_block_a_copy_of_its_own(transformer, one_step_input):
    before = transformer(**one_step_input).sample
    share_embedders(transformer, ["norm1.emb"])
    unshare_embedders(transformer)
    assert equal_embedders(transformer) == ["norm1.emb"]
    first, second = (dict(block.norm1.emb.named_parameters()) for block in transformer.transformer_blocks)
    assert not {p.data_ptr() for p in first.values()} & {p.data_ptr() for p in second.values()}
    assert torch.equal(transformer(**one_step_input).sample, before)


def test_unsharing_leaves_embedders_that_were_never_shared(transformer):
    embedder = transformer.transformer_blocks[1].norm1.emb
    unshare_embedders(transformer)
    assert transformer.transformer_blocks[1].norm1.emb is embedder


def test_duplicate_keys_lead_to_the_first_block(transformer):
    share_embedders(transformer, ["norm1.emb"])
    state, duplicates = transformer.state_dict(), duplicate_keys(transformer, ["norm1.emb"])
    assert set(duplicates) == {key for key in state if key.startswith("transformer_blocks.1.norm1.emb.")}
    assert all(original.startswith("transformer_blocks.0.norm1.emb.") for original in duplicates.values())
    assert all(state[key].data_ptr() == state[original].data_ptr() for key, original in duplicates.items())


def test_nothing_shared_has_no_duplicate_keys(transformer):
    assert duplicate_keys(transformer, []) == {}


# --- recording ---


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_recording_gives_one_tensor_per_block_of_the_last_pass(transformer, one_step_input):
    blocks = list(named_blocks(transformer).values())
    returned = []
    handles = [block.register_forward_hook(lambda module, arguments, output: returned.append(output)) for block in blocks]
    with recorded_outputs(blocks) as outputs:
        transformer(**one_step_input)
        transformer(**one_step_input)
    for handle in handles:
        handle.remove()
    assert [output.shape for output in outputs] == [(2, 16, 64)] * 2
    assert all(output is expected for output, expected in zip(outputs, returned[2:], strict=True))


def test_recording_leaves_no_hooks(transformer, one_step_input):
    before = num_hooks(transformer)
    with recorded_outputs(list(named_blocks(transformer).values())):
        assert num_hooks(transformer) > before
        transformer(**one_step_input)
    assert num_hooks(transformer) == before


def test_recording_leaves_no_hooks_after_an_error(transformer):
    before = num_hooks(transformer)
    with pytest.raises(KeyboardInterrupt), recorded_outputs(list(named_blocks(transformer).values())):
        raise KeyboardInterrupt
    assert num_hooks(transformer) == before


def test_a_block_of_two_streams_counts_with_both():
    class TwoStreams(nn.Module):
        def forward(self, x):
            return x, x + 1, None

    block = TwoStreams()
    with recorded_outputs([block]) as outputs:
        block(torch.zeros(3))
    assert [output.tolist() for output in outputs] == [[0, 0, 0], [1, 1, 1]]
