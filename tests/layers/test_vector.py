"""The two lives of a layer: hard ones equal F.linear with C[A], soft ones equal the plain formula and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from packed_layer_checks import check_decoding_changes_no_bit
from torch import Tensor, nn

from vq4dit.errors import FormatError
from vq4dit.layers.bitstream import pack_bits
from vq4dit.layers.codebook import nearest_codewords, split_subvectors
from vq4dit.layers.vector import VQLinear
from vq4dit.recipes import soft_layers
from vq4dit.recipes.soft_layers import MixCandidates, SoftVQLinear, start_logits

ROWS, COLUMNS, DIM = 12, 16, 2
SHAPE = (ROWS, COLUMNS)
NUM_SUBVECTORS = ROWS * COLUMNS // DIM


def fp16_values(*shape: int, generator: torch.Generator) -> Tensor:
    """What survives the rounding of a file."""
    return torch.randn(*shape, generator=generator).half().float()


def new_parts(k: int, generator: torch.Generator, *, bias: bool = False, row_scale: bool = False) -> dict:
    """The arguments of `VQLinear.from_assignments`."""
    return {
        "codebook": fp16_values(k, DIM, generator=generator),
        "assignments": torch.randint(k, (NUM_SUBVECTORS,), generator=generator),
        "shape": SHAPE,
        "bias": fp16_values(ROWS, generator=generator) if bias else None,
        "row_scale": fp16_values(ROWS, generator=generator) if row_scale else None,
    }


def new_soft(num_candidates: int, generator: torch.Generator, k: int = 8) -> SoftVQLinear:
    """A random layer between its nearest codewords, with random ratios."""
    weight, codebook = torch.randn(SHAPE, generator=generator), fp16_values(k, DIM, generator=generator)
    _, candidates = nearest_codewords(split_subvectors(weight, DIM), codebook, num_candidates)
    logits = torch.randn(candidates.shape, generator=generator)
    return SoftVQLinear(codebook, candidates, logits, SHAPE, fp16_values(ROWS, generator=generator))


@pytest.fixture
def x(generator) -> Tensor:
    return torch.randn(2, 3, COLUMNS, generator=generator)


# --- hard ---


@pytest.mark.parametrize("row_scale", [False, True], ids=["unscaled", "row scale"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("k", [16, 64, 256, 10, 300], ids=["4bit", "6bit", "8bit", "k=10", "k=300"])
def test_forward_is_a_linear_with_looked_up_codewords(k, bias, row_scale, x, generator):
    parts = new_parts(k, generator, bias=bias, row_scale=row_scale)
    layer = VQLinear.from_assignments(**parts)
    weight = parts["codebook"][parts["assignments"]].reshape(SHAPE)
    if row_scale:
        weight = torch.diag(parts["row_scale"]) @ weight
    assert layer.assignments.tolist() == parts["assignments"].tolist()
    torch.testing.assert_close(layer(x), F.linear(x, weight, parts["bias"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_scale", [False, True], ids=["unscaled", "row scale"])
def test_decoding_changes_no_bit_of_the_output(dtype, row_scale, x, generator):
    layer = VQLinear.from_assignments(**new_parts(64, generator, bias=True, row_scale=row_scale))
    layer.bias.data = layer.bias.data.to(dtype)
    check_decoding_changes_no_bit(layer, x.to(dtype))


def test_what_is_written_into_the_weight_is_used_and_noticed(x, generator):
    layer = VQLinear.from_assignments(**new_parts(64, generator, bias=True))
    assert not layer.is_changed
    before, delta = layer(x), torch.randn(SHAPE, generator=generator)
    assert layer.weight.shape == SHAPE
    assert not layer.is_changed
    layer.weight.data += delta  # as PEFT merges a LoRA
    assert layer.is_changed
    torch.testing.assert_close(layer(x), before + F.linear(x, delta))
    layer.drop_decoded()
    assert not layer.is_changed
    assert torch.equal(layer(x), before)


def test_numbers_are_rounded_to_fp16_so_that_saving_changes_nothing(generator):
    codebook, bias, scale = (torch.randn(*shape, generator=generator) for shape in [(16, DIM), (ROWS,), (ROWS,)])
    parts = new_parts(16, generator) | {"codebook": codebook, "bias": bias, "row_scale": scale}
    layer = VQLinear.from_assignments(**parts)
    for kept, given in [(layer.codebook, codebook), (layer.bias, bias), (layer.row_scale, scale)]:
        assert torch.equal(kept, given.half().float())


@pytest.mark.parametrize("decoded", [False, True], ids=["packed", "decoded"])
def test_only_packed_tensors_are_saved(decoded, generator):
    layer = VQLinear.from_assignments(**new_parts(16, generator, bias=True, row_scale=True))
    if decoded:
        layer.decode(torch.float32)
    assert set(layer.state_dict()) == {"codebook", "packed_assignments", "row_scale", "bias"}


def test_a_packed_layer_is_a_linear_that_takes_no_gradients(generator):
    layer = VQLinear.from_assignments(**new_parts(16, generator, bias=True, row_scale=True))
    assert isinstance(layer, nn.Linear)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_an_assignment_outside_the_codebook_is_found(generator):
    layer = VQLinear.from_assignments(**new_parts(10, generator))  # 4 bits could say 10 ... 15
    layer.check("block.to_q")
    damaged = layer.assignments.clone()
    damaged[5] = 12
    layer.packed_assignments.copy_(pack_bits(damaged, 4))
    with pytest.raises(FormatError, match="block.to_q: assignment 12 is outside its codebook of 10 codewords"):
        layer.check("block.to_q")


@pytest.mark.parametrize("k", [16, 64, 256])
def test_any_bytes_are_assignments_if_the_codebook_is_a_power_of_two(k, generator):
    layer = VQLinear.from_assignments(**new_parts(k, generator))
    layer.packed_assignments.fill_(255)
    layer.check("layer")
    assert layer.assignments.unique().tolist() == [k - 1]


# --- soft ---


def test_one_candidate_hardens_to_the_nearest_assignment(x, generator):
    weight, codebook = torch.randn(SHAPE, generator=generator), fp16_values(8, DIM, generator=generator)
    subvectors = split_subvectors(weight, DIM)
    _, nearest = nearest_codewords(subvectors, codebook)
    soft = SoftVQLinear(codebook, nearest, start_logits(subvectors, codebook, nearest, "uniform"), SHAPE, None)
    hard = soft.harden()
    assert torch.equal(hard.assignments.int(), nearest[:, 0].int())
    assert torch.equal(hard(x), soft(x))
    assert soft.decided_fraction == 1.0


@pytest.mark.parametrize("num_candidates", [2, 3])
def test_the_largest_ratio_wins(num_candidates, generator):
    soft = new_soft(num_candidates, generator)
    winners = [row[ratios.argmax()] for row, ratios in zip(soft.candidates.tolist(), soft.ratios, strict=True)]
    assert soft.harden().assignments.tolist() == winners


def test_hardening_keeps_codebook_and_bias(generator):
    soft = new_soft(2, generator)
    hard = soft.harden()
    assert torch.equal(hard.codebook, soft.codebook)
    assert torch.equal(hard.bias, soft.bias)


@pytest.mark.parametrize("mix_chunk", [7, 2**18], ids=["chunks", "whole"])
@pytest.mark.parametrize("num_candidates", [1, 2, 3])
def test_mixing_and_its_gradients_equal_the_plain_formula(num_candidates, mix_chunk, generator, monkeypatch):
    monkeypatch.setattr(soft_layers, "MIX_CHUNK", mix_chunk)
    soft = new_soft(num_candidates, generator)
    gradient = torch.randn(NUM_SUBVECTORS, DIM, generator=generator)
    mixed = MixCandidates.apply(soft.codebook, soft.logits, soft.candidates)
    mixed.backward(gradient)

    codebook = soft.codebook.detach().double().requires_grad_()
    logits = soft.logits.detach().double().requires_grad_()
    expected = (logits.softmax(1).unsqueeze(2) * codebook[soft.candidates.long()]).sum(1)
    expected.backward(gradient.double())
    torch.testing.assert_close(mixed, expected.float())
    torch.testing.assert_close(soft.codebook.grad, codebook.grad.float())
    if num_candidates > 1:
        torch.testing.assert_close(soft.logits.grad, logits.grad.float())
    else:
        assert soft.logits.grad is None  # a single ratio is 1, whatever its logit


def test_soft_forward_is_a_linear_with_mixed_codewords(x, generator):
    soft = new_soft(2, generator)
    weight = (soft.ratios.unsqueeze(2) * soft.codebook[soft.candidates.long()]).sum(1).view(SHAPE)
    torch.testing.assert_close(soft(x), F.linear(x, weight, soft.bias))


OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.05, alpha=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05),
}


@pytest.mark.parametrize("new_optimiser", OPTIMISERS.values(), ids=OPTIMISERS)
def test_decided_ratios_are_one_hot_and_stay(new_optimiser, x, generator):
    soft = new_soft(2, generator)
    optimiser = new_optimiser(soft.parameters())
    goal = torch.randn(2, 3, ROWS, generator=generator)

    def step() -> None:
        optimiser.zero_grad()
        F.mse_loss(soft(x), goal).backward()
        optimiser.step()

    step()  # the optimiser remembers gradients from before the decision
    before = soft.ratios.detach()
    soft.freeze_decided(0.7)
    frozen = soft.ratios.detach()
    decided = before.amax(1) > 0.7
    assert 0 < decided.sum() < NUM_SUBVECTORS
    assert soft.decided_fraction == pytest.approx(decided.float().mean().item())
    one_hot = F.one_hot(before.argmax(1), 2).float()
    assert torch.equal(frozen[decided], one_hot[decided])
    assert torch.equal(frozen[~decided], before[~decided])

    for _ in range(3):
        step()
    after = soft.ratios.detach()
    assert torch.equal(after[decided], one_hot[decided])
    assert (after[~decided] != before[~decided]).all()


@pytest.mark.parametrize("num_candidates", [2, 3])
def test_a_fraction_is_frozen_in_any_case_the_most_decided_first(num_candidates, generator):
    soft = new_soft(num_candidates, generator)
    before = soft.ratios.detach()
    soft.freeze_decided(0.99, fraction=0.5)
    decided = torch.isneginf(soft.logits).any(1)
    assert decided.sum() == NUM_SUBVECTORS // 2
    assert before.amax(1)[decided].min() >= before.amax(1)[~decided].max()
    assert torch.equal(soft.ratios.detach()[decided], F.one_hot(before.argmax(1), num_candidates).float()[decided])
    soft.freeze_decided(0.99, fraction=1.0)
    assert soft.decided_fraction == 1.0
    assert torch.equal(soft.logits.argmax(1), before.argmax(1))


def test_ties_are_frozen_as_one_candidate_each(generator):
    soft = new_soft(2, generator)
    with torch.no_grad():
        soft.logits.zero_()
    soft.freeze_decided(0.99, fraction=0.1)
    assert torch.equal(soft.ratios.sum(1), torch.ones(NUM_SUBVECTORS))
    assert torch.equal(soft.ratios.amax(1), torch.ones(NUM_SUBVECTORS))


def test_freezing_twice_changes_nothing(generator):
    soft = new_soft(3, generator)
    soft.freeze_decided(0.6)
    once = soft.logits.detach().clone()
    soft.freeze_decided(0.6)
    assert torch.equal(soft.logits, once)


@pytest.mark.parametrize("num_candidates", [1, 2, 4])
def test_uniform_start_gives_every_candidate_the_same_ratio(num_candidates, generator):
    subvectors, codebook = torch.randn(20, DIM, generator=generator), torch.randn(8, DIM, generator=generator)
    _, candidates = nearest_codewords(subvectors, codebook, num_candidates)
    ratios = start_logits(subvectors, codebook, candidates, "uniform").softmax(1)
    torch.testing.assert_close(ratios, torch.full((20, num_candidates), 1 / num_candidates))


def test_distance_start_gives_ratios_proportional_to_the_inverse_distance(generator):
    subvectors, codebook = torch.randn(20, DIM, generator=generator), torch.randn(8, DIM, generator=generator)
    distances, candidates = nearest_codewords(subvectors, codebook, 3)
    inverse = 1 / distances.sqrt()
    ratios = start_logits(subvectors, codebook, candidates, "distance").softmax(1)
    torch.testing.assert_close(ratios, inverse / inverse.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)


def test_distance_start_is_finite_on_a_codeword():
    codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    ratios = start_logits(codebook, codebook, torch.tensor([[0, 1], [1, 0]]), "distance").softmax(1)
    torch.testing.assert_close(ratios, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match='must be "uniform" or "distance", got \'random\''):
        start_logits(torch.zeros(1, 2), torch.zeros(2, 2), torch.zeros(1, 1, dtype=torch.int32), "random")


def test_what_is_written_in_another_dtype_is_used_too(generator):
    layer = VQLinear.from_assignments(**new_parts(64, generator))  # without a bias the weight is decoded to fp32
    layer.weight.data += torch.randn(SHAPE, generator=generator)
    half = torch.randn(3, COLUMNS, generator=generator).half()
    torch.testing.assert_close(layer(half), F.linear(half, layer.weight.half()))
    assert not torch.equal(layer(half), F.linear(half, layer.reconstruct(torch.float16)))


def test_casting_keeps_the_codebook_exact(generator):
    layer = VQLinear.from_assignments(**new_parts(64, generator, bias=True, row_scale=True))
    codebook, row_scale = layer.codebook.clone(), layer.row_scale.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.codebook, codebook) and torch.equal(layer.row_scale, row_scale)
