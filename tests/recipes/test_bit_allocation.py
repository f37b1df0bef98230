"""Rate allocation: one cost of an error for all layers, and the bits that are promised."""

import pytest
import torch

from vq4dit.recipes.bit_allocation import RateCurve, log_t_for


def curve(spread: float, rows: int = 8, columns: int = 16) -> RateCurve:
    return RateCurve(torch.full((rows,), spread), torch.ones(columns))


def test_fine_steps_take_the_bits_of_a_gaussian_and_one_more_for_each_halving():
    bits = [curve(1.0).bits(log_t) / 128 for log_t in (-4.0, -5.0)]
    assert bits[0] == pytest.approx(4 + 2.047, abs=0.01)  # log2(σ / Δ) + log2(2 π e) / 2
    assert bits[1] - bits[0] == pytest.approx(1, abs=0.01)


def test_an_error_is_that_of_the_step_or_of_a_weight_that_is_left_out():
    assert curve(1.0).error(-4.0) == pytest.approx(128 * 2.0**-8 / 12)
    assert curve(2.0).error(4.0) == pytest.approx(128 * 4.0)  # all that it is worth
    assert curve(1.0).error(-5.0) == pytest.approx(curve(1.0).error(-4.0) / 4)


def test_weights_far_below_a_step_take_none():
    assert curve(1.0).bits(4.0) < 0.01 * 128


def test_layers_share_bits_by_what_their_errors_cost():
    loud, quiet = curve(4.0), curve(1.0)
    log_t = log_t_for([loud, quiet], 6.0 * 256)
    bits = [c.bits(log_t) / 128 for c in (loud, quiet)]
    assert sum(bits) == pytest.approx(12, abs=0.01) and bits[0] - bits[1] == pytest.approx(2, abs=0.01)


def test_rows_and_columns_count_like_layers():
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(n, generator=generator) + 0.1 for n in (30, 50))
    whole = RateCurve(rows, columns).bits(-3.0)
    parts = sum(RateCurve(rows[i : i + 1], columns[j : j + 1]).bits(-3.0) for i in range(30) for j in range(50))
    assert whole == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("bits", [0.5, 2.0, 4.0])
def test_the_promise_is_kept(bits):
    generator = torch.Generator().manual_seed(1)
    curves = [RateCurve(torch.rand(20, generator=generator), torch.rand(30, generator=generator)) for _ in range(3)]
    log_t = log_t_for(curves, bits * 1800)
    assert sum(c.bits(log_t) for c in curves) == pytest.approx(bits * 1800, rel=1e-3)


def test_a_layer_of_zeros_takes_nothing_from_the_others():
    curves = [RateCurve(torch.zeros(8), torch.ones(16)), curve(1.0)]
    log_t = log_t_for(curves, 3.0 * 128)
    assert curves[1].bits(log_t) == pytest.approx(3.0 * 128, rel=0.01)
