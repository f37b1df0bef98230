"""Bytes -> integers as they were written in format versions 3 and 4: one stream a layer, read by a compiled loop.

A stream of asymmetric numeral systems is a stack, and a number in disguise: every one can be decoded, whatever has happened to
it. Two things show damage. Once all integers are read, nothing may be left; and who reads on where nothing is left finds the
least symbol for ever, so that symbol, -1023, has a code but is never written.

A module of its own because numba, which compiles the loop, takes half a second to import: who only looks at a model need not
wait for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Integer, UInt8
from torch import Tensor

from vq4dit.kernels import single_stream as kernel
from vq4dit.layers.lanes import damaged
from vq4dit.layers.scale_classes import GREATEST_LEVEL, GUARD, LEAST_LEVEL, UNIT, Sides, probabilities

WORD_BYTES = 4


def decode(
    stream: UInt8[Tensor, " bytes"], side_models: UInt8[Tensor, "kinds 2"], rows: int, columns: int
) -> tuple[Integer[Tensor, "rows columns"], Sides]:
    """The integers, int16, and their sides, all on the device of the stream (the work is one core's, about 9 ns an integer).

    Raises:
        FormatError: if the stream does not end with its last integer, or ends before it.
    """
    reader = _Reader(stream.cpu().numpy())
    found = []
    for (centre, level), count in zip(side_models.tolist(), (rows, rows, columns, columns), strict=True):
        if not LEAST_LEVEL <= level <= GREATEST_LEVEL:
            raise damaged()
        values = reader.read([level - LEAST_LEVEL], [count]).astype(np.int32) - GUARD + centre
        if count and not 0 <= values.min() <= values.max() <= 255:
            raise damaged()
        found.append(values.astype(np.uint8))
    _, row_level, _, column_level = found
    counts = _counts_of_levels(row_level, column_level)
    symbols = reader.read(np.arange(len(counts)), counts)
    if not reader.is_at_end:
        raise damaged()
    integers = np.empty((rows, columns), dtype=np.int16)
    first = np.cumsum(counts) - counts
    kernel.place(symbols, row_level, column_level, LEAST_LEVEL, GREATEST_LEVEL, GUARD, first, integers)
    return torch.from_numpy(integers).to(stream.device), Sides(*(torch.from_numpy(side).to(stream.device) for side in found))


class _Reader:
    """An ANS stream, read from its end."""

    def __init__(self, content: Any):
        if len(content) % WORD_BYTES:
            raise damaged()
        self._words = np.ascontiguousarray(content).view("<u4").astype(np.uint32)
        if len(self._words) and not self._words[-1]:  # which no encoder writes
            raise damaged()
        state = [int(word) for word in self._words[-2:]]
        self._cursor = np.array([sum(word << 32 * n for n, word in enumerate(state)), max(0, len(self._words) - 2)], np.uint64)

    def read(self, models: Any, counts: Any) -> Any:
        """Symbols, z + `GUARD`, of runs that have a model each.

        Raises:
            FormatError: if the stream ends before them.
        """
        symbols = np.empty(int(np.sum(counts)), np.int16)
        if not kernel.read(self._words, self._cursor, *_tables(), np.asarray(models), np.asarray(counts), symbols):
            raise damaged()
        return symbols

    @property
    def is_at_end(self) -> bool:
        return not self._cursor.any()


def _counts_of_levels(row_level: Any, column_level: Any) -> Any:
    """How many integers each level has."""
    of_rows, of_columns = (np.bincount(level, minlength=256) for level in (row_level, column_level))
    of_sums = np.convolve(of_rows, of_columns)
    below, above = of_sums[:LEAST_LEVEL].sum(), of_sums[GREATEST_LEVEL + 1 :].sum()
    counts = of_sums[LEAST_LEVEL : GREATEST_LEVEL + 1]
    counts[0] += below
    counts[-1] += above
    return counts


@cache
def _tables() -> tuple[Any, Any]:
    """Where the range of each symbol starts at each level, of 2^24; and what finds the range of a number.

    As `Categorical` makes them of probabilities: all but 2047 of 2^24 are shared out by them, and each symbol has one more.
    """
    one_sided = (probabilities() / UNIT).long().numpy()
    units = np.concatenate([one_sided[:, :0:-1], one_sided], axis=1)
    symbols, whole = units.shape[1], round(1 / UNIT)
    below = np.cumsum(units, axis=1) - units
    starts = (below * (whole - symbols) // whole) + np.arange(symbols)
    starts = np.concatenate([starts, np.full((len(starts), 1), whole)], axis=1).astype(np.uint32)
    return starts, kernel.hints_of(starts)
