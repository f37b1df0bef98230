"""How much more of a layer's errors is seen than B and H say: synthetic tokens whose errors cancel, add up, or neither."""

import pytest
import torch

from vq4dit.config import EntropyCodingConfig
from vq4dit.recipes.kronecker import KroneckerRatio

ROWS, COLUMNS, TOKENS, STEPS = 6, 5, 64, 400
UNDAMPED = EntropyCodingConfig(damping=0.0, coupling_damping=0.0)


def tokens(generator: torch.Generator, width: int) -> torch.Tensor:
    """Correlated values, of every token its own."""
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) + 2 * torch.eye(width)
    return torch.randn(TOKENS, width, generator=generator) @ mixing


def ratio_of(step, has_bias: bool = False, calls: int = 1) -> float:
    """ρ of a layer that hears inputs and gradients of `step(generator)`, shown in so many calls."""
    generator = torch.Generator().manual_seed(0)
    ratio, sensitivity = KroneckerRatio(has_bias, UNDAMPED), torch.zeros(ROWS, ROWS)
    for number in range(2 * STEPS):
        if number == STEPS:
            ratio.whiten(sensitivity)
        inputs, gradient = step(generator)
        sensitivity += gradient.T @ gradient
        for of_call in zip(inputs.chunk(calls), gradient.chunk(calls), strict=True):
            ratio.hear(*of_call, of=(number, 0), weight=1.0)
    return ratio.value()


def independent(generator):
    return tokens(generator, COLUMNS), tokens(generator, ROWS)


def test_of_tokens_that_know_nothing_of_each_other_it_is_one():
    assert ratio_of(independent) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("sign", "ratio"), [(1, 2.0), (-1, 0.0)])
def test_what_two_tokens_share_counts_double_and_what_their_gradients_undo_counts_nothing(sign, ratio):
    def pairs(generator):
        inputs, gradient = (values[: TOKENS // 2] for values in independent(generator))
        return torch.cat([inputs, inputs]), torch.cat([gradient, sign * gradient])

    assert ratio_of(pairs) == pytest.approx(ratio, rel=0.05, abs=1e-6)


def test_calls_of_one_step_are_seen_together():
    assert ratio_of(independent, calls=4) == pytest.approx(ratio_of(independent), rel=1e-5)


def test_a_mean_that_a_bias_makes_good_does_not_count():
    def with_a_mean(generator):
        inputs, gradient = independent(generator)
        return inputs + 3, gradient.mean(0).expand(TOKENS, ROWS)

    assert ratio_of(with_a_mean, has_bias=True) == pytest.approx(1, rel=0.1)
    assert ratio_of(with_a_mean) > 5


@pytest.mark.parametrize("known", [0.0, float("nan")])
def test_what_cannot_be_measured_is_one(known):
    ratio = KroneckerRatio(True, EntropyCodingConfig())
    ratio.whiten(torch.eye(ROWS))
    assert ratio.value() == 1  # never ran
    ratio = KroneckerRatio(True, EntropyCodingConfig())
    ratio.hear(torch.full((4, COLUMNS), known), torch.full((4, ROWS), known), (0, 0), 1.0)
    ratio.whiten(torch.full((ROWS, ROWS), known))
    ratio.hear(torch.full((4, COLUMNS), known), torch.full((4, ROWS), known), (1, 0), 1.0)
    assert ratio.value() == 1
