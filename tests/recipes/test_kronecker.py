"""How much more of a layer's errors is seen than B and H say: synthetic tokens whose errors cancel, add up, or neither."""

import pytest
import torch

from vq4dit.config import EntropyCodingConfig
from vq4dit.recipes.gptq import of_inputs
from vq4dit.recipes.kronecker import GradientSketches, kronecker_ratio

ROWS, COLUMNS, TOKENS, STEPS = 6, 5, 64, 400
MOST_TOKENS = 8  # of an H that is known badly
DAMPED = EntropyCodingConfig()


def tokens(generator: torch.Generator, width: int) -> torch.Tensor:
    """Correlated values, of every token its own."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) + 2 * torch.eye(width)
    return torch.randn(TOKENS, width, generator=generator) @ mixing


def independent(generator):
    return tokens(generator, COLUMNS), tokens(generator, ROWS)


def ratio_of(step, has_bias: bool = False, calls: int = 1, scale: float = 1.0, num_others: int = STEPS) -> float:
    """ρ of a layer that hears inputs and gradients of `step(generator)`, shown in so many calls."""
    generator, diagonal = torch.Generator().manual_seed(0), torch.zeros(ROWS)
    sketches = GradientSketches(torch.Generator().manual_seed(1))
    for number in range(STEPS):
        inputs, gradient = step(generator)
        gradient = scale * gradient
        diagonal = diagonal + gradient.square().sum(0)
        for of_call in zip(inputs.chunk(calls), gradient.chunk(calls), strict=True):
            sketches.hear(*of_call, of=(number, 0), weight=2.0, diagonal=diagonal)
    others = [step(generator)[0] for _ in range(num_others)]  # H is known of other tokens
    rows = torch.cat(others)[:MOST_TOKENS] if num_others == 1 else torch.cat(others)
    mean = rows.mean(0) if has_bias else None
    rows = rows if mean is None else rows - mean
    return kronecker_ratio(sketches.found(), of_inputs(rows.T @ rows / len(rows), DAMPED), mean)


def test_of_tokens_that_know_nothing_of_each_other_it_is_one_in_any_unit():
    assert ratio_of(independent) == pytest.approx(1, rel=0.05)
    assert ratio_of(independent, scale=1e-4) == pytest.approx(ratio_of(independent), rel=1e-4)


@pytest.mark.parametrize(("sign", "ratio"), [(1, 2.0), (-1, 0.0)])
def test_what_two_tokens_share_counts_double_and_what_their_gradients_undo_counts_nothing(sign, ratio):
    def pairs(generator):
        inputs, gradient = (values[: TOKENS // 2] for values in independent(generator))
        return torch.cat([inputs, inputs]), torch.cat([gradient, sign * gradient + (sign < 0) * 1e-6])

    assert ratio_of(pairs) == pytest.approx(ratio, rel=0.05, abs=1e-6)


def test_an_h_of_few_tokens_makes_nothing_of_it():
    assert ratio_of(independent, num_others=1) == pytest.approx(1, rel=0.05)


def test_padding_which_nobody_reads_does_not_count():
    def padded(generator):
        inputs, gradient = independent(generator)
        return torch.cat([inputs, 100 + inputs]), torch.cat([gradient, 0 * gradient])

    sketches = [GradientSketches(torch.Generator().manual_seed(1)) for _ in range(2)]
    for sketch, step in zip(sketches, (independent, padded), strict=True):
        sketch.hear(*step(torch.Generator().manual_seed(0)), (0, 0), 1.0, torch.ones(ROWS))
    torch.testing.assert_close(sketches[0].found(), sketches[1].found())


def test_calls_of_one_step_are_seen_together():
    assert ratio_of(independent, calls=4) == pytest.approx(ratio_of(independent), rel=0.05)


def test_a_mean_that_a_bias_makes_good_does_not_count():
    def with_a_mean(generator):
        inputs, gradient = independent(generator)
        return inputs + 3, gradient.mean(0).expand(TOKENS, ROWS)

    assert ratio_of(with_a_mean, has_bias=True) == pytest.approx(1, rel=0.1)
    assert ratio_of(with_a_mean) > 5


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_what_cannot_be_told_is_one(value):
    sketches = GradientSketches(torch.Generator())
    assert sketches.found() is None  # never ran
    sketches.hear(torch.ones(4, COLUMNS), torch.full((4, ROWS), value), (0, 0), 1.0, torch.ones(ROWS))
    assert sketches.found() is None
    assert kronecker_ratio(torch.full((2, 3, COLUMNS + 1), value), of_inputs(torch.eye(COLUMNS), DAMPED), None) == 1
