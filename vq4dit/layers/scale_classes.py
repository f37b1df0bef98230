"""How large a layer's integers are expected to be, and so how many bits each takes.

An entropy coder gives an integer of probability p about -log2 p bits. Each of Z (rows x columns) is expected to be a rounded
Gaussian of mean 0 whose standard deviation belongs to its row and its column, both told in quarter octaves:

    σ_ij = 2^((row_level_i + column_level_j - 32) / 4)

So a column of nothing but zeros costs nearly nothing, and one that matters may take as many bits as it needs. The sum of the
two levels is an integer's *scale class*. Coders are `lanes.py`, which rounds these probabilities to 12 bits, and
`single_stream.py`, which takes them as they are here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, UInt8
from torch import Tensor

from vq4dit.devices import exact

LARGEST = 1022  # |Z| at most
GUARD = LARGEST + 1  # -GUARD has a probability, and is never written: `single_stream.py` tells why
LEVELS_PER_OCTAVE = 4
LEVEL_OF_ONE = 32  # row_level + column_level where σ = 1
LEAST_LEVEL, GREATEST_LEVEL = 12, 68  # of the sum, where it ends counting: σ = 2^-5 and 2^9
UNIT = 2.0**-24  # of probabilities: coarse enough that the last digit of erf, which machines disagree on, does not matter


class Sides(NamedTuple):
    """What is told of each row and each column of a layer besides its integers."""

    row_step: UInt8[Tensor, " rows"]
    row_level: UInt8[Tensor, " rows"]
    column_step: UInt8[Tensor, " columns"]
    column_level: UInt8[Tensor, " columns"]


@cache
def probabilities() -> Float[Tensor, "levels symbols"]:
    """P(Z = z) = P(Z = -z) for z = 0 ... `GUARD`, at sums of levels `LEAST_LEVEL` ... `GREATEST_LEVEL`; at least a unit each.

    P(0) is what is left of 1, so that each row of both signs sums to 1 exactly.
    """
    levels = torch.arange(LEAST_LEVEL, GREATEST_LEVEL + 1, dtype=torch.float64, device="cpu")
    spread = torch.exp2((levels - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE).unsqueeze(1)
    edges = torch.arange(GUARD + 2, dtype=torch.float64, device="cpu") - 0.5
    tail = torch.special.erfc(edges / (spread * 2**0.5)) / 2  # P(Z > edge)
    found = ((tail[:, :-1] - tail[:, 1:]) / UNIT).round().clamp(min=1) * UNIT
    found[:, 0] = 1 - 2 * found[:, 1:].sum(1)
    return found


@cache
def code_lengths() -> Float[Tensor, "levels symbols"]:
    """Bits of |z|, its sign included: -log2 of `probabilities`."""
    return -probabilities().log2().float()


@cache
def expected_bits() -> Float[Tensor, " levels"]:
    """The mean length of an integer of each level: what the probabilities promise."""
    p = probabilities()
    bits = -p * p.log2()
    return (2 * bits.sum(1) - bits[:, 0]).float()


def level_rows(
    row_level: Integer[Tensor, " rows"], column_level: Integer[Tensor, " columns"]
) -> Integer[Tensor, "rows columns"]:
    """Which row of `probabilities` each integer has."""
    return (row_level.int().unsqueeze(1) + column_level.int()).clamp(LEAST_LEVEL, GREATEST_LEVEL) - LEAST_LEVEL


def coded_bits(
    integers: Integer[Tensor, "rows columns"],
    row_level: Integer[Tensor, " rows"],
    column_level: Integer[Tensor, " columns"],
) -> Float[Tensor, "rows columns"]:
    """Bits that each integer takes."""
    table = code_lengths().to(integers.device)
    return table[level_rows(row_level, column_level), integers.abs().int()]


def estimate_levels(
    integers: Integer[Tensor, "rows columns"],
) -> tuple[UInt8[Tensor, " rows"], UInt8[Tensor, " columns"]]:
    """The levels of rows and columns under which the integers take about the fewest bits.

    Starts where row and column mean squares agree with σ, and then moves each level a step or two where that saves bits.
    """
    squares = exact(integers).square()
    column = torch.ones(integers.shape[1], dtype=torch.float64, device=squares.device)
    for _ in range(5):
        row = (squares / column).mean(1) + 0.02
        column = (squares / row.unsqueeze(1)).mean(0) + 1e-3
    middle = column.log2().mean()  # so that both levels lie near 16

    def level(power: Tensor) -> Tensor:
        return (LEVELS_PER_OCTAVE / 2 * power + LEVEL_OF_ONE / 2).round().clamp(0, 255).int().to(integers.device)

    row_level, column_level = level(row.log2() + middle), level(column.log2() - middle)
    for _ in range(2):
        row_level = _best_step(integers, row_level, column_level)
        column_level = _best_step(integers.T, column_level, row_level)
    return row_level.to(torch.uint8), column_level.to(torch.uint8)


def _best_step(
    integers: Integer[Tensor, "rows columns"], row_level: Integer[Tensor, " rows"], column_level: Integer[Tensor, " columns"]
) -> Integer[Tensor, " rows"]:
    """Each row's level or one or two beside it, whatever takes the fewest bits."""
    candidates = torch.stack([(row_level + step).clamp(0, 255) for step in (0, -1, 1, -2, 2)])
    bits = torch.stack([coded_bits(integers, candidate, column_level).sum(1) for candidate in candidates])
    return candidates.gather(0, bits.argmin(0, keepdim=True))[0]
