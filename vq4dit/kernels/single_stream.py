"""Decode asymmetric numeral systems: integers of one stream after another, compiled, for the CPU.

A state of 64 bits holds what is left of the stream. Its lowest 24 bits lie in the range of one symbol, which has as many values
as its frequency; the rest of the state, times the frequency, plus how far into the range they lie, is the state before that
symbol was written. Where it falls below 2^32 a word of 32 bits follows. (Duda, arXiv:1311.2540; FORMAT.md, section 3.)

Which symbol's range a number lies in is looked up by its upper 12 bits: most of what these leave open is one symbol.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vq4dit.kernels.compiling import compiled

PRECISION = 24  # bits of a frequency
HINT_BITS = 12
BITS = np.uint64(PRECISION)
BELOW = np.uint64(2**PRECISION - 1)
HINT_SHIFT = np.uint64(PRECISION - HINT_BITS)
WORD = np.uint64(32)
LEAST_STATE = np.uint64(2**32)


def hints_of(starts: Any) -> Any:
    """For each value of a number's upper bits the symbol in whose range the least such number lies, and one more for the end.

    Args:
        starts: (models, symbols + 1) uint32: where the range of each symbol starts, and 2^24 at the end.
    """
    least = np.arange(2**HINT_BITS + 1) << (PRECISION - HINT_BITS)
    symbols = starts.shape[1] - 1
    found = [np.searchsorted(of_model, least, side="right") - 1 for of_model in starts]
    return np.minimum(np.stack(found), symbols - 1).astype(np.uint16)


@compiled
def read(  # pragma: no cover  compiled
    words: Any, cursor: Any, starts: Any, hints: Any, models: Any, counts: Any, symbols: Any
) -> bool:
    """Read runs of symbols, each run by a model of its own; False if one of them is 0, which is never written.

    Args:
        words: (words,) uint32, read from the last to the first.
        cursor: (2,) uint64: the state, and how many words are left; moved on.
        starts, hints: of each model, see `hints_of`.
        models, counts: (runs,) int64: of each run its model and its length.
        symbols: (sum of counts,) int16, written here.
    """
    state, left = cursor[0], np.int64(cursor[1])
    at = 0
    is_whole = True
    for run in range(len(models)):
        start, hint = starts[models[run]], hints[models[run]]
        for _ in range(counts[run]):
            within = state & BELOW
            slot = np.int64(within >> HINT_SHIFT)
            low, high = np.int64(hint[slot]), np.int64(hint[slot + 1])
            while low < high:  # the last symbol that starts at or before `within`
                middle = (low + high + 1) >> 1
                if np.uint64(start[middle]) <= within:
                    low = middle
                else:
                    high = middle - 1
            begins = np.uint64(start[low])
            state = (state >> BITS) * (np.uint64(start[low + 1]) - begins) + (within - begins)
            if state < LEAST_STATE and left > 0:
                left -= 1
                state = (state << WORD) | np.uint64(words[left])
            is_whole = is_whole and low > 0
            symbols[at] = low
            at += 1
    cursor[0], cursor[1] = state, np.uint64(left)
    return is_whole


@compiled
def place(  # pragma: no cover  compiled
    read_in_order: Any, row_level: Any, column_level: Any, least: int, greatest: int, origin: int, first: Any, found: Any
) -> None:
    """Put integers, which come by level and row by row within one, where they belong.

    Args:
        read_in_order: (rows x columns,) int16.
        row_level, column_level: whose sum, from `least` to `greatest`, is an integer's level.
        origin: is subtracted of each.
        first: (levels,) int64: where each level's integers begin; moved on.
        found: (rows, columns) int16, written here.
    """
    for i in range(len(row_level)):
        for j in range(len(column_level)):
            level = min(max(np.int64(row_level[i]) + np.int64(column_level[j]), least), greatest) - least
            found[i, j] = read_in_order[first[level]] - origin
            first[level] += 1
