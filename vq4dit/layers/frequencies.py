"""Probabilities of integers in units of 2^-12, as interleaved coders take them.

They are those of `scale_classes.py`, coarser: a table of 4,096 entries tells the integer of every number of 12 bits, and lies
in a processor's nearest memory. What is too unlikely for one unit has an escape, and follows in 12 bits. In classes above 52
(σ > 32) the low bits of an integer, which are as good as random, are told as they are, and the rest has the class of its size.
On real layers this takes 0.06 % more than probabilities of 24 bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from vq4dit.layers.scale_classes import GREATEST_LEVEL, LEAST_LEVEL, LEVEL_OF_ONE, LEVELS_PER_OCTAVE

UNITS = 2**12
LARGEST_SYMBOL = 127
ORIGIN, ESCAPE = 128, 0  # the symbols of 0, and of what follows in 12 bits
GREATEST_PLAIN = 52  # the greatest class whose integers have no low bits that are told as they are
KINDS = ("integers", "even", "odd")  # of quantizers: the multiples that have an index


@cache
def frequencies(kind: str, level: int) -> tuple[tuple[int, ...], int]:
    """Of the indices 0, 1, ... (each also of the negative one), in units of 2^-12, and of the escape; FORMAT.md, 4.3.

    An index has the probability that a Gaussian of standard deviation 2^((level - 32) / 4) lies nearest to its value. Only the
    0 of the odd multiples has less: whoever chooses among the paths of a trellis avoids it, and the even ones have another.
    """
    spread = 2 ** ((level - LEVEL_OF_ONE) / LEVELS_PER_OCTAVE)

    def beyond(index: int) -> float:
        """P(nearer to the value of this index than to that of the one before, or greater)."""
        edge = {"integers": index - 0.5, "even": 2 * index - 1, "odd": 0.125 if index == 1 else 2 * index - 2}[kind]
        return UNITS * math.erfc(edge / (spread * 2**0.5)) / 2

    found: list[int] = []
    while len(found) < LARGEST_SYMBOL and (units := round(beyond(len(found) + 1) - beyond(len(found) + 2))):
        found.append(units)
    escape = max(1, round(2 * beyond(len(found) + 1)))
    return (UNITS - escape - 2 * sum(found), *found), escape


class Tables(NamedTuple):
    """For the compiled loops: of each kind of quantizer, one after the other, and each class with a table of its own."""

    frequencies: Any  # (tables, 256) uint32
    starts: Any  # (tables, 256) uint32: where the range of each symbol begins
    entries: Any  # (tables x 4096,) uint32: symbol, in 8 bits | frequency - 1, in 12 | how far into its range, in 12
    shifts: Any  # (tables,) int64: low bits that are told as they are


@cache
def tables() -> Tables:
    levels = [(level, max(0, math.ceil((level - GREATEST_PLAIN) / LEVELS_PER_OCTAVE))) for level in levels_of("integers")]
    rows = [(KINDS[0], level - LEVELS_PER_OCTAVE * shift, shift) for level, shift in levels]
    rows += [(kind, level, 0) for kind in KINDS[1:] for level in levels_of(kind)]
    found = Tables(
        np.zeros((len(rows), 256), np.uint32),
        np.zeros((len(rows), 256), np.uint32),
        np.zeros((len(rows), UNITS), np.uint32),
        np.array([shift for *_, shift in rows], np.int64),
    )
    for row, (kind, level, _) in enumerate(rows):
        of_indices, escape = frequencies(kind, level)
        negative = of_indices[:0:-1]
        used = [ESCAPE, *range(ORIGIN - len(negative), ORIGIN + len(of_indices))]
        found.frequencies[row, used] = [escape, *negative, *of_indices]
        found.starts[row] = np.cumsum(found.frequencies[row]) - found.frequencies[row]
        symbols = np.repeat(np.arange(256, dtype=np.uint32), found.frequencies[row])
        offset = np.arange(UNITS, dtype=np.uint32) - found.starts[row, symbols]
        found.entries[row] = symbols | (found.frequencies[row, symbols] - 1) << 8 | offset << 20
    return found._replace(entries=found.entries.reshape(-1))


def levels_of(kind: str) -> range:
    return range(LEAST_LEVEL, (GREATEST_LEVEL if kind == "integers" else GREATEST_PLAIN) + 1)
