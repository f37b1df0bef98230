"""Where the bits go: steps so small that every weight, in every layer, costs the same error.

An error e in a weight of row i and column j costs w_i d_j e², once all weights that come later have made good what they can
(`vq4dit/recipes/gptq.py`). A step of size Δ leaves e² = Δ²/12, so if the steps are

    Δ_ij = t / sqrt(w_i d_j)

every integer costs t²/12, wherever it is. That is what "reverse water-filling" asks for (Cover and Thomas, section 10.3.3): no
bit could be moved to where it helps more. A weight of standard deviation σ then takes about log2(σ / Δ) + 2.05 bits, or nearly
none if σ is well below Δ. One t for the whole model gives the layers their bits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from vq4dit.layers.scale_classes import GREATEST_LEVEL, LEAST_LEVEL, LEVEL_OF_ONE, LEVELS_PER_OCTAVE, expected_bits

BINS_PER_OCTAVE = 16
HALVINGS = 50  # of the interval in which the logarithm of t is looked for


class RateCurve:
    """How many bits a layer takes at each t.

    Args:
        row_spread, column_spread: σ_ij sqrt(w_i d_j) is their outer product.
    """

    def __init__(self, row_spread: Float[Tensor, " rows"], column_spread: Float[Tensor, " columns"]):
        self.num_weights = len(row_spread) * len(column_spread)
        (rows, row_counts), (columns, column_counts) = _histogram(row_spread), _histogram(column_spread)
        self.log_spread = (rows.unsqueeze(1) + columns).flatten() / BINS_PER_OCTAVE  # a few thousand, however large the layer
        self.counts = torch.outer(row_counts, column_counts).flatten().double()

    def bits(self, log_t: float) -> float:
        """Bits of all weights together at t = 2^log_t."""
        level = LEVELS_PER_OCTAVE * (self.log_spread - log_t) + LEVEL_OF_ONE - LEAST_LEVEL
        level = level.clamp(0, GREATEST_LEVEL - LEAST_LEVEL - 1e-3)
        below, table = level.long(), expected_bits().double()
        found = torch.lerp(table[below], table[below + 1], (level - below).double())
        return (found * self.counts).sum().item()

    def error(self, log_t: float) -> float:
        """What all weights together cost at t: each t²/12, or all that it is worth where no bit is spent on it."""
        return (self.counts * torch.exp2(2 * self.log_spread).clamp(max=4.0**log_t / 12)).sum().item()


def log_t_for(curves: Iterable[RateCurve], bits: float) -> float:
    """The log2 of the t at which layers take that many bits together."""
    curves = list(curves)
    low = min(float(curve.log_spread.min()) for curve in curves) - 12
    high = max(float(curve.log_spread.max()) for curve in curves) + 6
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(curve.bits(middle) for curve in curves) > bits else (low, middle)
    return high


def _histogram(spread: Tensor) -> tuple[Tensor, Tensor]:
    logarithm = spread.cpu().double().clamp(min=1e-30).log2()
    return torch.unique((BINS_PER_OCTAVE * logarithm).round(), return_counts=True)
