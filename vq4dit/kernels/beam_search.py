"""Round the columns of a weight one after the other, and keep the few best roundings: compiled, for the CPU.

A rounding is a path through a tree: each column is an integer, and what that got wrong moves what is wanted of the columns
after it. `beam` paths of a row are kept. A path costs the sum of its squared errors, each times the cost of its column, and
the price of the bits that its integers take.

Two things make it fast. An error corrects at once only what is wanted inside its block of columns. And paths that differ now
have nearly always the same past: when a block is done, the one that was done `OPEN` blocks before it is decided as the cheapest
path has it, and paths that disagree end. So all paths of a row share what is wanted of the columns behind, and a decided block
corrects it once, not once for each path; only what the open blocks did is worked out path by path.

Sums are taken in a fixed order and products are not fused, so every processor finds the same integers for the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vq4dit.kernels.compiling import compiled
from vq4dit.kernels.paths import continue_paths, memory_of_paths

BLOCK = 64  # columns that are corrected at once
OPEN = 2  # blocks that are not decided yet: one costs 2 to 4 % of a beam of 32's error on correlated columns, two 0.1 to 0.4 %
ROWS = 16  # at a time: they share what they read of the factor, and all they work in stays near


@compiled
def _begin(  # pragma: no cover  compiled
    state: Any, wanted: Any, past_errors: Any, across: Any, undecided: int
) -> None:
    """What the paths of a row want of a block of columns: what all do, corrected by what each did in its open blocks.

    Args:
        state: (paths, `BLOCK`), written here.
        wanted: of these columns.
        past_errors: (paths, open columns), of which the first `undecided` are known.
        across: (open columns, `BLOCK`): the part of the factor.
    """
    for path in range(len(state)):
        one, past = state[path], past_errors[path]
        one[: len(wanted)] = wanted
        for j in range(0, undecided, 4):
            a, b, c, d = past[j], past[j + 1], past[j + 2], past[j + 3]
            fa, fb, fc, fd = across[j], across[j + 1], across[j + 2], across[j + 3]
            for at in range(len(one)):
                one[at] -= (a * fa[at] + b * fb[at]) + (c * fc[at] + d * fd[at])


@compiled
def _trace_back(  # pragma: no cover  compiled
    trace: Any, origin: Any, block_errors: Any, block_integers: Any, width: int
) -> None:
    """What each path did in the block that was gone through, and which path it continues."""
    parents, integers, errors = trace[0], trace[1], trace[2]
    for path in range(len(origin)):
        origin[path] = path
    for j in range(width - 1, -1, -1):
        for path in range(len(origin)):
            at = origin[path]
            block_errors[path, j], block_integers[path, j] = errors[j, at], integers[j, at]
            origin[path] = parents[j, at]


@compiled
def _keep_agreeing(  # pragma: no cover  compiled
    errors: Any,
    integers: Any,
    origin: Any,
    total: Any,
    place: int,
    is_decided: bool,
    block: Any,
    kept_errors: Any,
    kept_integers: Any,
    totals: Any,
) -> int:
    """Those paths that did in the oldest open block what the best did, if it is decided now; returns how many they are.

    Args:
        errors, integers: in open blocks, (paths, open columns), of the paths that are continued.
        place: of the oldest block, which the new one takes.
        block: what each path did in the new block, errors and integers.
        kept_errors, kept_integers: as `errors` and `integers`, written here.
        totals: what each costs beyond the best; written here.
    """
    best, kept, stop = np.argmin(total), 0, place + BLOCK
    decided = integers[origin[best]][place:stop]
    for path in range(len(origin)):
        parent = origin[path]
        agrees = True
        if is_decided and parent != origin[best]:
            for j in range(BLOCK):
                agrees = agrees and integers[parent, place + j] == decided[j]
        if agrees:
            kept_errors[kept], kept_integers[kept] = errors[parent], integers[parent]
            kept_errors[kept][place:stop], kept_integers[kept][place:stop] = block[0][path], block[1][path]
            totals[kept] = total[path] - total[best]
            kept += 1
    return kept


@compiled
def _take_part(here: Any, across: Any, factor: Any, start: int, stop: int) -> None:  # pragma: no cover  compiled
    """Of the factor: how errors in a block's columns move each other, and how those in open blocks move them."""
    for j in range(stop - start):
        for at in range(stop - start):
            here[j, at] = factor[start + j, start + at] if at >= j else 0
    for first in range(max(0, start - OPEN * BLOCK), start, BLOCK):
        place = first % (OPEN * BLOCK)
        for j in range(BLOCK):
            for at in range(stop - start):
                across[place + j, at] = factor[first + j, start + at]


@compiled
def round_rows(  # pragma: no cover  compiled
    wanted: Any, factor: Any, cost: Any, price: Any, levels: Any, lengths: Any, beam: int, found: Any
) -> None:
    """Round each row for itself, columns in their order; best about `ROWS` at a time, which then share what they read.

    Args:
        wanted: (rows, columns) in steps, float32; it is overwritten.
        factor: (columns, columns) float32: an error e in column j moves what is wanted of column l > j by -e factor[j, l].
        cost: (columns,) float32: an error e in column j costs e² cost[j].
        price: (rows,) float32: of a bit.
        levels: (rows, columns) uint8: the row of `lengths` that holds the bits of an integer there.
        lengths: (levels, symbols) float32: bits of |z|.
        beam: paths that are kept.
        found: (rows, columns) int16: the integers, written here.
    """
    num_rows, num_columns = wanted.shape
    trace = memory_of_paths(BLOCK, beam)
    state, here = np.zeros((2, beam, BLOCK), np.float32), np.zeros((BLOCK, BLOCK), np.float32)
    across = np.zeros((OPEN * BLOCK, BLOCK), np.float32)
    block = np.zeros((beam, BLOCK), np.float32), np.zeros((beam, BLOCK), np.int16)
    origin, total = np.empty(beam, np.int32), np.empty(beam, np.float32)
    paths, totals = np.ones(num_rows, np.int64), np.zeros((num_rows, beam), np.float32)
    # a block's place among those that are open is its number modulo `OPEN`; twice: read from one, written into the other
    errors = np.zeros((2, num_rows, beam, OPEN * BLOCK), np.float32)
    rounded = np.zeros((2, num_rows, beam, OPEN * BLOCK), np.int16)
    decided = np.zeros((num_rows, BLOCK), np.float32)
    now, then = 0, 1
    for start in range(0, num_columns, BLOCK):
        stop, place, oldest = min(start + BLOCK, num_columns), start % (OPEN * BLOCK), start - OPEN * BLOCK
        _take_part(here, across, factor, start, stop)
        for row in range(num_rows):
            count = paths[row]
            total[:count] = totals[row, :count]
            _begin(state[0][:count], wanted[row][start:stop], errors[now, row], across, min(start, OPEN * BLOCK))
            count = continue_paths(
                state, here, cost[start:stop], price[row], lengths, levels[row][start:stop], beam, total, count, trace
            )
            _trace_back(trace, origin[:count], block[0], block[1], stop - start)
            if oldest >= 0:
                best = origin[np.argmin(total[:count])]
                found[row, oldest : oldest + BLOCK] = rounded[now, row, best, place : place + BLOCK]
                decided[row] = errors[now, row, best, place : place + BLOCK]
            paths[row] = _keep_agreeing(
                errors[now, row],
                rounded[now, row],
                origin[:count],
                total[:count],
                place,
                oldest >= 0,
                block,
                errors[then, row],
                rounded[then, row],
                totals[row],
            )
        now, then = then, now
        if oldest >= 0:  # it is decided: correct what is wanted of the columns behind this block
            _correct(wanted, decided, factor[oldest : oldest + BLOCK], stop)
    for row in range(num_rows):
        best = np.argmin(totals[row, : paths[row]])
        for at in range(max(0, (num_columns - 1) // BLOCK - OPEN + 1) * BLOCK, num_columns):
            found[row, at] = rounded[now, row, best, at % (OPEN * BLOCK)]


@compiled
def _correct(wanted: Any, errors: Any, factor: Any, first: int) -> None:  # pragma: no cover  compiled
    """wanted[:, first:] -= errors @ factor[:, first:], a strip of columns at a time: it stays in the nearest cache."""
    columns = wanted.shape[1]
    for start in range(first, columns, 256):
        stop = min(start + 256, columns)
        for j in range(0, BLOCK, 4):
            fa, fb = factor[j][start:stop], factor[j + 1][start:stop]
            fc, fd = factor[j + 2][start:stop], factor[j + 3][start:stop]
            for i in range(len(wanted)):
                a, b, c, d = errors[i, j], errors[i, j + 1], errors[i, j + 2], errors[i, j + 3]
                row = wanted[i][start:stop]
                for at in range(stop - start):
                    row[at] -= (a * fa[at] + b * fb[at]) + (c * fc[at] + d * fd[at])
