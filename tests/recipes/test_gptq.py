"""Error feedback against brute force, and against the error it minimises."""

import itertools

import pytest
import torch
from coded_models import output_error
from correlated import correlated, seeded

from vq4dit.config import EntropyCodingConfig
from vq4dit.layers.entropy_coded import nearest_step, step_size
from vq4dit.layers.scale_classes import LARGEST, coded_bits, estimate_levels
from vq4dit.recipes import gptq
from vq4dit.recipes.gptq import (
    Correction,
    ErrorFeedback,
    QuantizedWeight,
    damp,
    damp_coupling,
    of_inputs,
    quantize_weights,
    round_together,
)
from vq4dit.recipes.rounding import Rate

CONFIG = EntropyCodingConfig()
SEEDS = pytest.mark.parametrize("seed", range(4))


def problem(seed: int, rows: int = 48, columns: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight whose rows differ in size, moments of correlated inputs, and of correlated gradients."""
    generator = seeded(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.2)
    return weight, correlated(500, columns, generator), correlated(500, rows, generator)


def joint_error(error: torch.Tensor, moments: torch.Tensor, coupling: torch.Tensor) -> float:
    """tr(B E H Eᵀ), damped as while quantizing."""
    return ((damp_coupling(coupling, CONFIG.coupling_damping) @ error @ damp(moments, CONFIG.damping)) * error).sum().item()


def taken(integers: torch.Tensor) -> float:
    return coded_bits(integers, *estimate_levels(integers)).sum().item()


def quantize_weight(weight, moments, sensitivity, bits, config) -> QuantizedWeight:
    """One alone."""
    return quantize_weights([weight], moments, [sensitivity], [bits], config)[0]


def feedback_of(moments, sensitivity) -> ErrorFeedback:
    return ErrorFeedback(of_inputs(moments, CONFIG), sensitivity, CONFIG)


def scales_of(feedback, weight, log_t) -> tuple[torch.Tensor, torch.Tensor]:
    column_scale = feedback.column_scale(balance := feedback.balance(log_t))
    return feedback.row_scale(weight, column_scale, log_t, balance), column_scale


def rounded(feedback, weight, row_scale, column_scale, beam) -> torch.Tensor:
    return round_together([feedback], [weight], [row_scale], column_scale, [Rate.free(weight)], beam)[0]


def test_white_inputs_and_equal_rows_are_rounded_to_the_nearest():
    weight, _, _ = problem(0)
    feedback = feedback_of(torch.eye(32), torch.ones(48))
    scales = scales_of(feedback, weight, -3.0)
    steps = torch.outer(*scales)
    assert steps.std() / steps.mean() < 1e-3
    assert torch.equal(rounded(feedback, weight, *scales, beam=1), (weight / steps).round().short())


@SEEDS
@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows coupled"])
def test_feedback_keeps_what_matters_better_than_rounding(seed, beam, coupled):
    weight, moments, coupling = problem(seed)
    sensitivity = coupling if coupled else coupling.diagonal()
    feedback = feedback_of(moments, sensitivity)
    row_scale, column_scale = scales_of(feedback, weight, feedback_t(feedback, weight))
    steps = torch.outer(row_scale, column_scale)
    found = rounded(feedback, weight, row_scale, column_scale, beam)
    metric = coupling if coupled else torch.diag(coupling.diagonal())
    nearest = joint_error(weight - (weight / steps).round() * steps, moments, metric)
    assert joint_error(weight - found * steps, moments, metric) < 0.7 * nearest


def feedback_t(feedback: ErrorFeedback, weight: torch.Tensor) -> float:
    return gptq.log_t_for([feedback.rate_curve(weight)], 2.0 * weight.numel())


@SEEDS
def test_rows_that_correct_each_other_are_better_together(seed):
    weight, moments, coupling = problem(seed)
    together = quantize_weight(weight, moments, coupling, 2.0 * weight.numel(), CONFIG)
    apart = quantize_weight(weight, moments, coupling.diagonal(), 2.0 * weight.numel(), CONFIG)
    errors = [joint_error(weight - quantized.weight(), moments, coupling) for quantized in (together, apart)]
    assert errors[0] < 0.9 * errors[1]


def test_a_wide_beam_is_better_and_costs_no_bits():
    errors, bits = [], []
    for seed in range(4):
        weight, moments, coupling = problem(seed)
        configs = [EntropyCodingConfig(beam=beam) for beam in (1, 8)]
        found = [quantize_weight(weight, moments, coupling, 2.0 * weight.numel(), config) for config in configs]
        errors.append([joint_error(weight - quantized.weight(), moments, coupling) for quantized in found])
        bits.append([taken(quantized.integers) for quantized in found])
    (near, wide), (bits_near, bits_wide) = torch.tensor(errors).sum(0), torch.tensor(bits).sum(0)
    assert wide < 0.95 * near and bits_wide < 1.02 * bits_near


def test_a_beam_that_holds_all_roundings_finds_the_best_of_them():
    generator = seeded(1)
    weight, moments = torch.randn(3, 5, generator=generator), correlated(200, 5, generator)
    feedback = feedback_of(moments, torch.ones(3))
    scales = scales_of(feedback, weight, -1.0)
    found = rounded(feedback, weight, *scales, beam=4**5)
    steps = torch.outer(*scales)
    near = (weight / steps).floor()
    for row in range(3):
        every = [near[row] + torch.tensor(move) for move in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=5)]
        costs = [(e := weight[row] - integers * steps[row]) @ damp(moments, CONFIG.damping) @ e for integers in every]
        error = weight[row] - found[row] * steps[row]
        assert error @ damp(moments, CONFIG.damping) @ error <= min(costs) * 1.001


@pytest.mark.parametrize("element", [0, 3, 7])
def test_later_elements_move_where_the_quadratic_is_least(element):
    metric = damp(correlated(300, 8, seeded(element)), CONFIG.damping)
    correction = Correction(metric)
    ordered = metric[correction.order][:, correction.order].double()
    later = ordered[element + 1 :, element + 1 :]
    best = -torch.linalg.solve(later, ordered[element + 1 :, element])
    factor = correction.factor
    torch.testing.assert_close(factor[element, element + 1 :] / factor[element, element], best)  # errors, after the move
    error = torch.cat([torch.ones(1, dtype=torch.float64), best])
    least = error @ ordered[element:, element:] @ error
    assert correction.costs()[correction.order[element]].item() == pytest.approx(least.item(), rel=1e-4)


def test_rows_that_matter_more_are_kept_better_and_take_more_bits():
    weight, moments, _ = problem(2)
    weight = weight / weight.square().mean(1, keepdim=True).sqrt()
    sensitivity = torch.ones(48)
    sensitivity[:24] = 16
    quantized = quantize_weight(weight, moments, sensitivity, 2.0 * weight.numel(), CONFIG)
    errors = (weight - quantized.weight()).square().mean(1)
    bits = coded_bits(quantized.integers, *estimate_levels(quantized.integers)).mean(1)
    assert errors[:24].mean() < 0.2 * errors[24:].mean()
    assert 1.0 < bits[:24].mean() - bits[24:].mean() < 2.5  # four times finer steps


@SEEDS
@pytest.mark.parametrize("bits", [1.5, 2.0, 3.0, 4.0])
def test_the_promised_bits_are_taken(seed, bits):
    weight, moments, coupling = problem(seed, rows=128, columns=96)
    quantized = quantize_weight(weight, moments, coupling, bits * weight.numel(), CONFIG)
    assert taken(quantized.integers) / weight.numel() == pytest.approx(
        bits, abs=0.05
    )  # sizes of steps come in eighths of an octave


def test_another_bit_for_each_weight_divides_the_error_by_four():
    weight, moments, coupling = problem(3, rows=64, columns=64)
    errors = [
        joint_error(weight - quantize_weight(weight, moments, coupling, b * weight.numel(), CONFIG).weight(), moments, coupling)
        for b in (3.0, 4.0)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_scales_are_of_a_size_that_a_file_can_tell():
    weight, moments, coupling = problem(0)
    for factor in (1e-6, 1.0, 1e6):
        quantized = quantize_weight(weight, moments * factor, coupling / factor, 3.0 * weight.numel(), CONFIG)
        for scale in (quantized.row_scale, quantized.column_scale):
            assert torch.equal(scale, step_size(nearest_step(scale))) and 2**-15 < scale.min() <= scale.max() < 2**15
        assert output_error(weight, quantized.weight(), moments) < 0.02


def test_a_weight_of_zeros_stays_and_no_number_is_lost():
    quantized = quantize_weight(torch.zeros(8, 16), torch.zeros(16, 16), torch.zeros(8), 100.0, CONFIG)
    assert not quantized.weight().any()


def test_fewer_inputs_than_columns_still_keep_the_weight(generator):
    weight = torch.randn(32, 64, generator=generator)
    inputs = torch.randn(3, 64, generator=generator)
    quantized = quantize_weight(weight, inputs.T @ inputs / 3, torch.ones(32), 4.0 * weight.numel(), CONFIG)
    assert output_error(weight, quantized.weight(), torch.eye(64)) < 0.3


def test_the_same_weight_gives_the_same_integers():
    weight, moments, coupling = problem(0)
    first, second = (quantize_weight(weight, moments, coupling, 2.0 * weight.numel(), CONFIG) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bits", [-200.0, 0.0])
def test_where_no_bits_are_left_none_are_taken(bits):
    weight, moments, coupling = problem(0)
    assert taken(quantize_weight(weight, moments, coupling, bits, CONFIG).integers) < 0.05 * weight.numel()


def test_a_weight_far_above_all_others_is_kept_and_costs_its_own_row_only():
    weight, moments, _ = problem(0)
    weight[3, 5] = 1e4
    quantized = quantize_weight(weight, moments, torch.ones(48), 2.0 * weight.numel(), CONFIG)
    assert quantized.integers.abs().max() < LARGEST
    assert quantized.weight()[3, 5] == pytest.approx(1e4, rel=0.01)
    others = torch.arange(48) != 3
    assert (quantized.weight() - weight)[others].abs().max() < 10


@SEEDS
@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows coupled"])
def test_more_bits_are_better_for_weights_with_heavy_tails(seed, coupled):
    _, moments, coupling = problem(seed, 64, 128)
    normal, chi = torch.randn(64, 128, generator=seeded(seed)), torch.randn(64, 128, 2, generator=seeded(seed + 9))
    weight = normal / chi.square().mean(2).sqrt()  # Student's t, two degrees of freedom: its variance is infinite
    sensitivity = coupling if coupled else coupling.diagonal()
    metric = coupling if coupled else torch.diag(sensitivity)
    errors = []
    for bits in (2.0, 3.0, 4.0, 5.0):
        quantized = quantize_weight(weight, moments, sensitivity, bits * weight.numel(), EntropyCodingConfig(beam=2))
        assert taken(quantized.integers) < 1.03 * bits * weight.numel()
        errors.append(joint_error(quantized.weight() - weight, moments, metric))
    assert all(more < less / 2.5 for less, more in itertools.pairwise(errors))


@pytest.mark.parametrize("beam", [1, 8])
@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows coupled"])
def test_layers_of_one_input_are_rounded_side_by_side_as_each_would_be_alone(beam, coupled):
    """They have different numbers of rows, so some are done before others."""
    moments = problem(0)[1]
    layers, weights, row_scales = [], [], []
    for seed, rows in enumerate((48, 8, 100)):
        weight, _, coupling = problem(seed, rows)
        layers.append(feedback := feedback_of(moments, coupling if coupled else coupling.diagonal()))
        weights.append(weight)
        row_scales.append(scales_of(feedback, weight, -2.0)[0])
    column_scale = layers[0].column_scale(0.0)
    together = round_together(layers, weights, row_scales, column_scale, [Rate.free(weight) for weight in weights], beam)
    for found, layer, weight, row_scale in zip(together, layers, weights, row_scales, strict=True):
        alone = rounded(layer, weight, row_scale, column_scale, beam)
        assert found.shape == weight.shape and (found != alone).float().mean() < 0.01  # sums in another order


@SEEDS
def test_layers_of_one_input_share_their_column_scale_and_lose_nothing_by_it(seed):
    moments = problem(seed)[1]
    problems = [problem(seed + 10 * number, rows) for number, rows in enumerate((48, 24, 96))]
    weights, couplings = [weight * 4.0**n for n, (weight, *_) in enumerate(problems)], [coupling for *_, coupling in problems]
    bits = [b * weight.numel() for b, weight in zip((2.0, 3.0, 1.5), weights, strict=True)]
    together = quantize_weights(weights, moments, couplings, bits, CONFIG)
    assert all(torch.equal(quantized.column_scale, together[0].column_scale) for quantized in together)
    for quantized, weight, coupling, promised in zip(together, weights, couplings, bits, strict=True):
        assert taken(quantized.integers) / weight.numel() == pytest.approx(promised / weight.numel(), abs=0.1)
        alone = quantize_weight(weight, moments, coupling, promised, CONFIG)
        errors = [joint_error(weight - q.weight(), moments, coupling) for q in (quantized, alone)]
        assert errors[0] < 1.15 * errors[1]


@pytest.mark.parametrize("factor", [0.0, 1e-8, 1e-4])
@pytest.mark.parametrize("bits", [0.0, 2.0])
def test_a_layer_of_zeros_or_far_smaller_than_the_others_costs_them_nothing(factor, bits):
    moments = problem(0)[1]
    problems = [problem(seed) for seed in range(3)]
    weights, couplings = [weight for weight, *_ in problems], [coupling for *_, coupling in problems]
    weights[1] = weights[1] * factor
    promised = [b * weight.numel() for b, weight in zip((2.0, bits, 2.0), weights, strict=True)]
    together = quantize_weights(weights, moments, couplings, promised, CONFIG)
    for quantized, weight, coupling, wanted in zip(together, weights, couplings, promised, strict=True):
        alone = quantize_weight(weight, moments, coupling, wanted, CONFIG)
        errors = [joint_error(weight - q.weight(), moments, coupling) for q in (quantized, alone)]
        assert errors[0] <= 1.15 * errors[1]
